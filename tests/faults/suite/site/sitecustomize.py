"""Python imports this when it starts, where this folder is on its path: puts faults into ranks that burnish has started by itself."""

import json
import os
import traceback

if "RANK" in os.environ and "FAULTS_OF_RANKS" in os.environ:
    try:
        from tests.faults.suite.driver import install

        install(json.loads(os.environ["FAULTS_OF_RANKS"]))
    except BaseException:  # Python would go on without the faults
        traceback.print_exc()
        os._exit(97)
