"""Run the grid with Ray Tune and its MLflow callback. `python ray_tune.py SPEC [KEY=VALUE ...]`"""

import os
import sys

import ray
from ray import tune
from ray.air.integrations.mlflow import MLflowLoggerCallback
from work import WORKERS, one_trial, prepare, trials

if __name__ == "__main__":
    spec, *sets = sys.argv[1:]
    folder = os.environ["PEER_FOLDER"]
    todo = trials(spec, tuple(sets))
    prepare(list(todo.values()))

    def trainable(config: dict) -> None:
        tune.report(one_trial(config["trial"], trials(spec, tuple(sets))[config["trial"]]))

    ray.init(
        num_cpus=WORKERS,
        include_dashboard=False,
        runtime_env={
            "env_vars": {
                "PYTHONPATH": os.environ["PYTHONPATH"],
                "PEER_FOLDER": folder,
                "OMP_NUM_THREADS": "1",
            }
        },
    )
    space = {"trial": tune.grid_search(list(todo))}
    path = f"{folder}/tune/grid-of-{len(todo)}"
    callback = MLflowLoggerCallback(f"sqlite:///{folder}/mlflow.db", experiment_name="grid")
    if tune.Tuner.can_restore(path):
        tuner = tune.Tuner.restore(path, trainable, resume_errored=True, param_space=space)
    else:
        config = tune.RunConfig(os.path.basename(path), f"{folder}/tune", callbacks=[callback])
        tuner = tune.Tuner(trainable, param_space=space, run_config=config)
    tuner.fit()
