"""What the processes of a distributed training run: several commands one after the other, so that torch loads once."""

import json
import sys

from m6rec.train.cli import main

if __name__ == "__main__":
    for arguments in json.loads(sys.argv[1]):
        code = main(arguments)
        if code:
            sys.exit(code)
