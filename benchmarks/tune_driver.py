"""The other side of ``recovery.py``: the same training under Ray Tune, on the same cluster.

    python tune_driver.py ADDRESS FOLDER EVERY [restore]

The trainable calls the trainer's own modules in the trial's process: the same preparation, step and
checkpoint files; the run is FOLDER/spec.json. A checkpoint is reported to Tune at the first step after it was
written; a trial that was restarted restores the last one that was reported. Run directories appear under
FOLDER/tries, each with the id and the address of its node. With ``restore`` it goes on with what an earlier
driver left.
"""

import secrets
import shutil
import sys
from pathlib import Path
from typing import Any

from ray import tune

from orchestrator.on_ray import local_ray


def train(config: dict[str, Any]) -> None:
    """One attempt of the trial."""
    import ray

    from storage.local import complete_checkpoints
    from trainer.attempt import prepare
    from trainer.loop import Loop
    from trainer.rundir import CheckpointPolicy, Options, RunDir
    from trainer.snapshot import Progress, load_checkpoint
    from trainer.stop import Stop

    class Reporting(Stop):
        """Is asked before every step whether to stop: never, but it is a place to report a checkpoint."""

        def check(self) -> None:
            for checkpoint in complete_checkpoints(run_dir.checkpoints)[:1]:
                tune.report(
                    {"step": checkpoint.step}, checkpoint=tune.Checkpoint.from_directory(str(checkpoint.path))
                )
                shutil.rmtree(checkpoint.path)

    run_dir = RunDir(Path(config["folder"], "tries", secrets.token_hex(4)))
    run_dir.checkpoints.mkdir(parents=True)
    (run_dir.root / "address").write_text(ray.util.get_node_ip_address())
    (run_dir.root / "node").write_text(ray.get_runtime_context().get_node_id())
    run_dir.spec.write_text(config["spec"])
    options = Options(
        threads=1,
        cache_dir=config["cache"],
        checkpoint=CheckpointPolicy(every_steps=config["every"], every_s=None),
    )
    run_dir.options.write_text(options.model_dump_json())
    parts = prepare(run_dir, Reporting())
    progress = Progress()
    if checkpoint := tune.get_checkpoint():
        with checkpoint.as_directory() as folder:
            target = run_dir.root / f"resume-{Path(folder).name}"
            shutil.copytree(folder, target)
        progress = load_checkpoint(target, parts.methods, parts.optimizer)
    Loop(parts, progress).run()


def main() -> None:
    address, folder, every = sys.argv[1], sys.argv[2], int(sys.argv[3])
    spec = Path(folder, "spec.json").read_text()
    local_ray.connect(address)
    trainable = tune.with_resources(train, {"cpu": 1})
    space = {"folder": folder, "cache": f"{folder}/cache", "spec": spec, "every": every}
    if sys.argv[4:] == ["restore"]:
        tune.Tuner.restore(f"{folder}/tune/recovery", trainable, param_space=space).fit()
        return
    tuner = tune.Tuner(
        trainable,
        param_space=space,
        run_config=tune.RunConfig(
            name="recovery",
            storage_path=f"{folder}/tune",
            failure_config=tune.FailureConfig(max_failures=-1),
            checkpoint_config=tune.CheckpointConfig(num_to_keep=2),
            verbose=0,
        ),
    )
    tuner.fit()


if __name__ == "__main__":
    main()
