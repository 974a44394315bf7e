// The tokenizer of a model, from its tokenizer.json: byte-level BPE (as M6RecTokenizer.train makes it) or WordPiece (as
// BERT and MiniLM have it). Texts are data: spellings of special tokens are ordinary text.

// The split of byte-level BPE; White_Space, since \s also has U+FEFF and lacks U+0085.
const PIECES =
  /'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\p{White_Space}\p{L}\p{N}]+|\p{White_Space}+(?!\P{White_Space})|\p{White_Space}+/gu;
const KEPT = 50000;
const utf8 = new TextEncoder();

export function makeTokenizer(json) {
  const kinds = { BPE: ByteLevel, WordPiece };
  const kind = kinds[json.model.type];
  if (!kind) throw new Error(`a tokenizer of type ${json.model.type} is not supported: BPE or WordPiece is`);
  return new kind(json);
}

class Tokenizer {
  constructor(json) {
    this.special = new Map(json.added_tokens.map((token) => [token.id, token.content]));
    this.kept = new Map();
  }

  encode(text) {
    let ids = this.kept.get(text);
    if (ids === undefined) {
      ids = this.encodeWhole(text);
      if (ids.some((id) => this.special.has(id))) ids = this.spellOut(text);
      if (this.kept.size >= KEPT) this.kept.clear();
      this.kept.set(text, ids);
    }
    return ids;
  }

  // A text with characters that the vocabulary lacks, which are the unknown token. Spellings of special tokens are cut in
  // two, so that they stay ordinary text.
  spellOut(text) {
    const spellings = [...this.special.values()].sort((one, other) => other.length - one.length);
    const found = new RegExp(spellings.map((each) => each.replace(/[.*+?^${}()|[\]\\]/g, "\\$&")).join("|"), "gu");
    const cuts = [...text.matchAll(found)].map((match) => match.index + 1);
    return [0, ...cuts].flatMap((start, index) => this.encodeWhole(text.slice(start, cuts[index])));
  }
}

class ByteLevel extends Tokenizer {
  constructor(json) {
    super(json);
    const steps = [json.pre_tokenizer, ...(json.pre_tokenizer?.pretokenizers ?? [])];
    const split = steps.find((step) => step?.type === "ByteLevel");
    const plain = json.normalizer === null || json.normalizer?.type === "NFC";
    if (!split || steps.length > 1 || split.add_prefix_space || split.use_regex === false || !plain) {
      throw new Error("this tokenizer is not supported: byte-level BPE without prefix space, normalised by NFC, is");
    }
    this.form = json.normalizer?.type ?? null;
    this.ids = new Map(Object.entries(json.model.vocab));
    this.tokens = new Map([...this.ids].map(([token, id]) => [id, token]));
    this.ranks = new Map(json.model.merges.map((pair, rank) => [Array.isArray(pair) ? pair.join(" ") : pair, rank]));
    [this.letters, this.bytes] = byteLetters();
    this.words = new Map();
  }

  encodeWhole(text) {
    const normal = this.form ? text.normalize(this.form) : text;
    return (normal.match(PIECES) ?? []).flatMap((piece) => this.word(piece));
  }

  word(piece) {
    let ids = this.words.get(piece);
    if (ids === undefined) {
      let parts = Array.from(utf8.encode(piece), (byte) => this.letters[byte]);
      for (;;) {
        let best = -1;
        let lowest = Infinity;
        for (let index = 0; index + 1 < parts.length; index++) {
          const rank = this.ranks.get(`${parts[index]} ${parts[index + 1]}`);
          if (rank < lowest) [best, lowest] = [index, rank];
        }
        if (best < 0) break;
        parts = [...parts.slice(0, best), parts[best] + parts[best + 1], ...parts.slice(best + 2)];
      }
      ids = parts.map((part) => this.ids.get(part));
      if (this.words.size >= KEPT) this.words.clear();
      this.words.set(piece, ids);
    }
    return ids;
  }

  decode(ids) {
    const letters = ids.filter((id) => !this.special.has(id)).map((id) => this.tokens.get(id));
    const bytes = Uint8Array.from(letters.join(""), (letter) => this.bytes.get(letter));
    return new TextDecoder("utf-8", { ignoreBOM: true }).decode(bytes);
  }
}

// The letter of each byte in a byte-level vocabulary (GPT-2).
function byteLetters() {
  const letters = [];
  let further = 256;
  for (let byte = 0; byte < 256; byte++) {
    const own = (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || byte >= 174;
    letters.push(String.fromCharCode(own ? byte : further++));
  }
  return [letters, new Map(letters.map((letter, byte) => [letter, byte]))];
}

const CHINESE =
  /[\u4e00-\u9fff\u3400-\u4dbf\u{20000}-\u{2a6df}\u{2a700}-\u{2b73f}\u{2b740}-\u{2b81f}\u{2b920}-\u{2ceaf}\uf900-\ufaff\u{2f800}-\u{2fa1f}]/gu;
const PUNCTUATION = /[!-/:-@[-`{-~\p{P}]/gu;

class WordPiece extends Tokenizer {
  constructor(json) {
    super(json);
    const { normalizer, pre_tokenizer: split, model } = json;
    if (normalizer?.type !== "BertNormalizer" || split?.type !== "BertPreTokenizer" || json.decoder?.type !== "WordPiece") {
      throw new Error("this tokenizer is not supported: WordPiece with the normaliser, splits and decoder of BERT is");
    }
    this.normalizer = normalizer;
    this.prefix = model.continuing_subword_prefix;
    this.most = model.max_input_chars_per_word;
    this.cleanup = json.decoder.cleanup;
    this.ids = new Map(Object.entries(model.vocab));
    this.tokens = new Map([...this.ids].map(([token, id]) => [id, token]));
    this.unknown = this.ids.get(model.unk_token);
  }

  encodeWhole(text) {
    const { clean_text: clean, handle_chinese_chars: chinese, lowercase } = this.normalizer;
    let normal = text;
    if (clean) normal = normal.replace(/[\0\ufffd]|(?![\t\n\r])[\p{Cc}\p{Cf}\p{Cn}\p{Co}]/gu, "").replace(/\p{White_Space}/gu, " ");
    if (chinese) normal = normal.replace(CHINESE, " $& ");
    if (this.normalizer.strip_accents ?? lowercase) normal = normal.normalize("NFD").replace(/\p{Mn}/gu, "");
    if (lowercase) normal = Array.from(normal, (each) => each.toLowerCase()).join("");
    const words = normal.replace(PUNCTUATION, " $& ").split(/\p{White_Space}+/u);
    return words.filter(Boolean).flatMap((word) => this.word([...word]));
  }

  word(letters) {
    if (letters.length > this.most) return [this.unknown];
    const found = [];
    for (let start = 0; start < letters.length; ) {
      let end = letters.length;
      let id;
      for (; end > start; end--) {
        id = this.ids.get((start ? this.prefix : "") + letters.slice(start, end).join(""));
        if (id !== undefined) break;
      }
      if (id === undefined) return [this.unknown];
      found.push(id);
      start = end;
    }
    return found;
  }

  decode(ids) {
    const tokens = ids.filter((id) => !this.special.has(id)).map((id) => this.tokens.get(id));
    return tokens.map((token, index) => this.spelled(token, index)).join("");
  }

  spelled(token, index) {
    let text = token;
    if (index) text = token.startsWith(this.prefix) ? token.slice(this.prefix.length) : ` ${token}`;
    if (!this.cleanup) return text;
    for (const mark of [" .", " ?", " !", " ,"]) text = text.replaceAll(mark, mark.slice(1));
    text = text.replaceAll(" ' ", "'");
    for (const [from, to] of [[" n't", "n't"], [" 'm", "'m"], [" do not", " don't"]]) text = text.replaceAll(from, to);
    for (const end of [" 's", " 've", " 're"]) text = text.replaceAll(end, end.slice(1));
    return text;
  }
}
