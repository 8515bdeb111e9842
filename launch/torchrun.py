"""torchrun, but with the exit status of the rank that failed first, or 128 + the signal that killed it.

Its own status is 1 whatever happened.
"""

import sys

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

if __name__ == "__main__":
    try:
        main()
    except ChildFailedError as error:
        print(error, file=sys.stderr)
        status = error.get_first_failure()[1].exitcode
        sys.exit(status if status >= 0 else 128 - status)
