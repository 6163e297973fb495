"""Run the grid with joblib. `python joblib_loop.py SPEC [KEY=VALUE ...]`"""

import json
import os
import sys
from pathlib import Path

from joblib import Parallel, delayed
from work import WORKERS, one_trial, prepare, trials

if __name__ == "__main__":
    todo = trials(sys.argv[1], tuple(sys.argv[2:]))
    prepare(list(todo.values()))
    found = Parallel(n_jobs=WORKERS)(delayed(one_trial)(*item) for item in todo.items())
    results = dict(zip(todo, found, strict=True))
    (Path(os.environ["PEER_FOLDER"]) / "results.json").write_text(json.dumps(results, indent=1))
