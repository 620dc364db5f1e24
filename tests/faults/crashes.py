"""Crashes: kill -9, and what it leaves behind."""

import shutil
import time

from tests.faults.harness import Lab, Trials, damage, need


def kills_around_saves(lab: Lab) -> Trials:
    reference, kills = lab.reference(), 5 if lab.is_quick else 50
    done = 0
    while done < kills:
        name = lab.name()
        background = done % 2 == 0
        while done < kills:
            child = lab.start(name, checkpoint__background=background)
            folder = lab.run(name) / "checkpoints"
            seen, wanted = set(), lab.rng.randint(1, 2)

            def saving(folder=folder, seen=seen, wanted=wanted) -> bool:
                seen |= {p.name for p in folder.glob(".*.tmp-*")} if folder.is_dir() else set()
                return len(seen) >= wanted

            if not child.until(saving):
                child.wait().must(0)
                break
            time.sleep(lab.rng.uniform(0, 0.25))
            child.kill()
            done += 1
            yield
        lab.train(name, checkpoint__background=background).must(0)
        lab.same(name, reference)
        lab.tidy(name)
    yield


def kills_at_points(lab: Lab) -> Trials:
    reference = lab.reference()
    points = ("before_commit", "mid_gc", "begin", "mid_write", "after_commit")
    for point in points[: 2 if lab.is_quick else None]:
        name = lab.name()
        lab.train(name, fault=f"ckpt.{point}:2:kill9")
        again = lab.train(name).must(0)
        if point == "before_commit":
            words = "resuming from step 5", "step 10 was incomplete and has been removed"
            need(all(word in again.said for word in words), again.said)
        lab.same(name, reference)
        lab.tidy(name)
        yield


def kill_while_removing(lab: Lab) -> Trials:
    reference, name = lab.reference(), lab.name()
    lab.train(name, fault="ckpt.mid_gc:1:kill9")
    store = lab.store(name)
    need(len(store.steps()) == 2, f"checkpoints {store.steps()}")
    damage(store.folder / str(store.latest()) / "meta.json", "half", lab.rng)
    lab.train(name).must(0, "falling back to step")
    lab.same(name, reference)
    yield


def junk(lab: Lab) -> Trials:
    reference, name = lab.reference(), lab.name()
    lab.train(name, fault="ckpt.after_commit:3:kill9")
    folder = lab.store(name).folder
    for junk in ("19", "-5", "best", "4.orbax-checkpoint-tmp", ".30.tmp-99"):
        (folder / junk).mkdir()
    (folder / "12").write_text("", encoding="utf-8")
    shutil.copytree(folder / "15", folder / "18")
    (folder / "18" / "MANIFEST.json").unlink()
    shutil.copytree(folder / "15", folder / "33")
    said = lab.train(name).must(0, "resuming from step 15", "falling back to step 15").said
    for ignored in ("19", "-5", "best", "12"):
        need(f"{folder / ignored} is no checkpoint" in said, said)
        need((folder / ignored).exists(), f"{ignored} was touched")
    need(not (folder / ".30.tmp-99").exists(), "what is half-written stays")
    lab.same(name, reference)
    yield
