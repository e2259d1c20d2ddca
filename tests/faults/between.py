"""`stepfold`, killed between the gradient of a critic's update and the optimiser's step.

between.py NUMBER distill ...

NUMBER counts the updates of a critic over the whole run.
"""

import os
import signal
import sys
from typing import Any

from stepfold.cli import main
from stepfold.training import step

if __name__ == "__main__":
    number, gradient = int(sys.argv.pop(1)), step.critic_gradient

    def killed(*args: Any) -> Any:
        found = gradient(*args)
        if args[-1] == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    step.critic_gradient = killed
    main()
