"""The fault tests by name: each breaks something many times and counts what was survived.

A case is a generator: it yields after each trial that kept every promise, and raises `Lost` for one
that did not. The names are those of docs/reliability.md.
"""

from collections.abc import Callable

from tests.faults import (
    crashes,
    damage,
    disks,
    inputs,
    neighbours,
    numbers,
    peers,
    resuming,
    signals,
)
from tests.faults.harness import Lab, Trials

CASES: dict[str, tuple[str, Callable[[Lab], Trials]]] = {
    "A1": (
        "kill -9 around a checkpoint, in the foreground and in the background",
        crashes.kills_around_saves,
    ),
    "A2": ("kill -9 at each point of a save", crashes.kills_at_points),
    "A3": (
        "kill -9 while an old checkpoint is removed, then damage to the newer ones",
        crashes.kill_while_removing,
    ),
    "A5": ("junk among the checkpoints", crashes.junk),
    "B1": ("SIGTERM in the middle of a run", signals.preempted),
    "B2": (
        "SIGTERM while it compiles, evaluates, saves, waits for data; first and last step",
        signals.preempted_anywhere,
    ),
    "B3": ("a second signal, SIGHUP without a terminal", signals.pressed_twice),
    "B7": ("a step that never ends: stacks and exit 76; the launcher goes on", signals.stalled),
    "C1": (
        "each file of the newest checkpoint deleted, emptied, halved, one bit flipped",
        damage.damaged,
    ),
    "C1b": ("one flipped bit in any file of the newest checkpoint", damage.flipped),
    "C2": ("every checkpoint damaged: refused, never begun again", damage.all_damaged),
    "C3": ("a checkpoint of another model, optimizer or dtype", damage.another_model),
    "C5": ("verify finds a flipped bit in any file", damage.verified),
    "D1": (
        "no room for a checkpoint: training goes on, and halts at the third in a row",
        disks.no_room,
    ),
    "D2": ("the last checkpoint cannot be written", disks.last_save_fails),
    "D3": ("a checkpoint fails once, and the next one succeeds in the same process", disks.heals),
    "D4": ("outputs that cannot be written: exit 73 before anything is compiled", disks.unwritable),
    "E1": ("one bad step: nothing moves, also across a resume", numbers.one_bad_step),
    "E2": ("an infinity on one of eight devices", numbers.on_one_of_eight),
    "E3": ("bad steps: reduce, roll back, halt; kills on the way", numbers.ladder),
    "E4": ("no checkpoint of a run that diverges is not finite", numbers.never_committed),
    "E5": ("a bad loss enters no statistics", numbers.statistics),
    "E7": ("float16: overflows, the scale after a resume, the way to float32", numbers.half),
    "G1": ("1 device, then 8, then 2; data, fsdp, tensor, pmap", numbers.elastic),
    "G2": ("2 processes, then 1 with 4 devices, 2 again, 1", peers.other_processes),
    "G3": ("a batch that the devices cannot share", numbers.indivisible),
    "B4": ("several processes: SIGTERM to one of them, or to all", peers.preempted),
    "H1": ("2 processes train as 1 with 2 devices does; one writes", peers.like_one),
    "H2": ("kill -9 of a process: all end, and the run goes on", peers.worker_killed),
    "H3": ("kill -9 of the first process", peers.coordinator_killed),
    "H4": ("a process that is stopped, or hangs", peers.stuck),
    "H5": ("an error that one process alone meets", peers.one_fails),
    "H6": ("a process that comes 40 s late to an evaluation", peers.late),
    "H7": ("processes that do not find each other", peers.not_found),
    "H8": ("processes with other configs", peers.disagreeing),
    "F1": ("the same command twice", resuming.twice),
    "F2": ("stopped after any step, and continued", resuming.any_step),
    "F3": ("stopped around the end of an epoch", resuming.epochs),
    "F4": ("stopped with gradients of several micro-batches", resuming.accumulated),
    "F5": ("dropout after a resume: the same masks, and they matter", resuming.dropout),
    "F6": (
        "any number of worker processes and batches ahead, also changed on resume",
        resuming.workers,
    ),
    "F7": ("data that has changed: refused, and named", resuming.changed_data),
    "F8": (
        "evaluating, saving and sampling more or less often changes no number",
        resuming.looking,
    ),
    "F9": ("a longer run: the learning rates of both schedules are said", resuming.longer),
    "F12": ("fewer cores: said, and nearly the same losses", resuming.cores),
    "I2": ("kill -9 of a trainer: its workers end", inputs.orphans),
    "L1": ("another tokenizer, in training and in sampling", inputs.another_tokenizer),
    "M1": (
        "two trainers on one run: the second ends with 69 in less than 3 s",
        neighbours.two_trainers,
    ),
    "M1b": ("two new trainers of one name at the same moment", neighbours.two_at_once),
    "M2": ("the lock of a process that was killed", neighbours.stale_lock),
    "M3": ("evaluating and sampling while the trainer saves and removes", neighbours.readers),
    "M4": ("runs without a name that begin in the same second", neighbours.same_second),
    "M5": ("clocks and places of the world that change between lives", neighbours.clocks),
    "M6": ("locales, pipes, missing HOME, odd folders", neighbours.surroundings),
}

# Also tried in CI, with fewer trials. The other cases are variations of these.
QUICK = "A1 B1 C1 D1 M1".split()
