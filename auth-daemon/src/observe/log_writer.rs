//! Writes the log on a thread of its own, so that a reader that stalls does not hold up connections.

use std::{io, sync::OnceLock};

use tracing_appender::non_blocking::{ErrorCounter, NonBlocking, NonBlockingBuilder, WorkerGuard};

/// Maximum number of lines that wait for the reader. Further lines are lost, of whatever kind, and counted.
const MAX_WAITING: usize = 16 * 1024;

static LOST: OnceLock<ErrorCounter> = OnceLock::new();

/// Returns a writer to standard error. Dropping the guard writes the lines that wait, for at most a second.
pub(crate) fn to_stderr() -> (NonBlocking, WorkerGuard) {
    let (writer, guard) = NonBlockingBuilder::default()
        .buffered_lines_limit(MAX_WAITING)
        .lossy(true)
        .thread_name("log")
        .finish(io::stderr());
    let _ = LOST.set(writer.error_counter());
    (writer, guard)
}

/// Number of lines that were lost since the start.
pub(crate) fn lost_lines() -> u64 {
    LOST.get().map_or(0, |lost| lost.dropped_lines() as u64)
}
