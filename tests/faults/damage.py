"""Damage: checkpoints whose files are not what they were."""

import sys

from tests.faults.harness import Child, Lab, Trials, damage, files, need


def _damage_in_process(lab: Lab, kinds: str, trials: int | None) -> Trials:
    """Tries damages one after the other in one process, which imports JAX once."""
    base = lab.reference(training__num_steps=20)
    words = [sys.executable, "-m", "tests.faults.damage_loop", str(lab.folder), base, kinds]
    words += [str(trials)] if trials else []
    ended = Child(words, lab.environment(), lab.folder).wait(1800)
    for _ in range(ended.said.count("survived")):
        yield
    need(ended.code == 0, ended.said[-3000:])


def damaged(lab: Lab) -> Trials:
    yield from _damage_in_process(lab, "delete,empty,half,flip", 4 if lab.is_quick else None)


def flipped(lab: Lab) -> Trials:
    yield from _damage_in_process(lab, "flip", 4 if lab.is_quick else 100)


def all_damaged(lab: Lab) -> Trials:
    for kind in ("flip",) if lab.is_quick else ("flip", "delete"):
        name = lab.copy(lab.reference())
        for path in sorted(lab.store(name).folder.glob("*/meta.json")):
            damage(path, kind, lab.rng)
        for _ in range(2):
            said = lab.train(name, training__num_steps=60).must(74).said
            need(said.count("step 40: meta.json") == 1 and "resume=none" in said, said)
        again = lab.train(name, "--config.checkpoint.resume=none").must(0)
        need("the checkpoint is set aside" in again.said, again.said)
        lab.same(name, lab.reference())
        yield


def another_model(lab: Lab) -> Trials:
    name = lab.copy(lab.reference())
    for field, value in (
        ("model.num_layers", 3),
        ("model.d_model", 32),
        ("model.bias", False),
        ("optim.clip_norm", "none"),
        ("data.tokenizer", "byte"),
        ("training.precision", "bfloat16"),
    ):
        change = {field.replace(".", "__"): value}
        said = lab.train(name, **change).must(78).said
        need(said.count("\n") == 1 and f"config error: {field}=" in said, said)
        yield
    lab.train(name).must(0, "is finished")


def verified(lab: Lab) -> Trials:
    name = lab.copy(lab.reference())
    lab.command("verify", f"--run={lab.run(name)}").must(0, "whole")
    paths = files(lab.store(name).folder / "40")
    for path in lab.rng.sample(paths, 3 if lab.is_quick else 12):
        whole = path.read_bytes()
        damage(path, "flip", lab.rng)
        lab.command("verify", f"--run={lab.run(name)}").must(70, "step 40: damaged: ")
        path.write_bytes(whole)
        yield
