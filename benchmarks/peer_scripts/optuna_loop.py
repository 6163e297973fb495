"""Run the grid with Optuna on sqlite. `python optuna_loop.py SPEC [KEY=VALUE ...]`"""

import os
import sys

import optuna
from work import WORKERS, one_trial, prepare, trials

if __name__ == "__main__":
    todo = trials(sys.argv[1], tuple(sys.argv[2:]))
    prepare(list(todo.values()))

    def objective(trial: optuna.Trial) -> float:
        name = trial.suggest_categorical("trial", list(todo))
        found = one_trial(name, todo[name])
        trial.set_user_attr("objectives", found)
        return found["test/accuracy"]

    study = optuna.create_study(
        study_name=f"grid-of-{len(todo)}",  # a study refuses changed choices
        storage=f"sqlite:///{os.environ['PEER_FOLDER']}/optuna.db",
        sampler=optuna.samplers.GridSampler({"trial": list(todo)}, seed=0),
        direction="maximize",
        load_if_exists=True,
    )
    study.optimize(objective, n_jobs=WORKERS)
