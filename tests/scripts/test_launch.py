"""Launch files: accelerate takes the configs, and a job of Slurm starts one launcher a node with the right ranks."""

import os
import subprocess
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "launch_slurm.sh"
# Stand in for Slurm's commands, on both nodes of a job one after the other, and for Python.
FAKES = {
    "scontrol": "#!/bin/bash\nprintf 'node-a\\nnode-b\\n'\n",
    "srun": '#!/bin/bash\nshift\nfor node in 0 1; do SLURM_NODEID=$node "$@"; done\n',
    "python": '#!/bin/bash\nprintf "%s|" "$@" >> "$CALLS"\necho >> "$CALLS"\n',
}


@pytest.mark.parametrize(("name", "machines", "processes"), [("1x8", 1, 8), ("nx8", 2, 16)])
def test_accelerate_takes_the_config(name: str, machines: int, processes: int) -> None:
    config = load_config_from_file(str(ROOT / "pipelines" / "launch" / f"{name}.yaml"))
    assert isinstance(config, ClusterConfig)
    assert (config.num_machines, config.num_processes, config.mixed_precision) == (machines, processes, "no")
    assert config.distributed_type.value == "MULTI_GPU"
    assert (config.main_process_ip is None) == (machines == 1)


def run_script(
    tmp_path: Path, *arguments: str, **environment: str
) -> tuple[list[str], subprocess.CompletedProcess[str]]:
    binaries, calls = tmp_path / "bin", tmp_path / "calls"
    binaries.mkdir()
    for name, text in FAKES.items():
        (binaries / name).write_text(text)
        (binaries / name).chmod(0o755)
    path = f"{binaries}{os.pathsep}{os.environ['PATH']}"
    values = os.environ | {"PATH": path, "CALLS": str(calls), "PYTHON": "python"} | environment
    done = subprocess.run([SCRIPT, *arguments], env=values, cwd=ROOT, capture_output=True, text=True, check=False)
    return (calls.read_text().splitlines() if calls.exists() else []), done


def test_each_node_of_a_job_starts_its_processes(tmp_path: Path) -> None:
    calls, done = run_script(
        tmp_path,
        "train",
        "my recipe.toml",
        "out=runs/a b",
        SLURM_JOB_NODELIST="node-[a-b]",
        SLURM_NNODES="2",
        SLURM_GPUS_ON_NODE="4",
        SLURM_SUBMIT_DIR=str(ROOT),
    )
    assert done.returncode == 0, done.stderr
    shared = (
        f"-m|accelerate.commands.launch|--config_file|{ROOT}/pipelines/launch/nx8.yaml|--num_machines|2|--num_processes|8|"
        "--main_process_ip|node-a|--main_process_port|29500|--max_restarts|3|--machine_rank|"
    )
    own = "|-m|saekit_pipelines|train|my recipe.toml|out=runs/a b|"
    assert calls == [f"{shared}0{own}", f"{shared}1{own}"]


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (["train", "R.toml"], {"SLURM_JOB_NODELIST": ""}, "no Slurm job here, needs sbatch"),
        (["cache", "R.toml"], {"SLURM_JOB_NODELIST": "a"}, "found 'cache R.toml', needs train RECIPE.toml"),
        (["train"], {"SLURM_JOB_NODELIST": "a"}, "found 'train', needs train RECIPE.toml"),
    ],
)
def test_what_is_missing_is_one_line(
    tmp_path: Path, arguments: list[str], environment: dict[str, str], message: str
) -> None:
    calls, done = run_script(tmp_path, *arguments, **environment)
    assert done.returncode == 2
    assert done.stderr.startswith("scripts/launch_slurm.sh: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert calls == []
