"""TensorBoard's event files, in its own record format and without TensorFlow or torch.

Apart from the logger, which loads this module with its first numbers: TensorBoard takes a while to
import, and the first step need not wait for that.
"""

import time
from collections.abc import Mapping
from typing import IO

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter


class EventWriter:
    """Writes events into a file that is open.

    Args:
      file: empty.
      step: the first that comes; TensorBoard is told to forget those from there on, which an
        earlier file of the run may have.
    """

    def __init__(self, file: IO[bytes], step: int):
        self._file = file
        self._records = RecordWriter(file)
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))
        start = SessionLog(status=SessionLog.START)
        self._write(Event(wall_time=time.time(), step=step, session_log=start))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes numbers of a step, by tag."""
        summary = Summary(
            value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        )
        self._write(Event(wall_time=time.time(), step=step, summary=summary))

    def _write(self, event: Event) -> None:
        self._records.write(event.SerializeToString())
        self._file.flush()
