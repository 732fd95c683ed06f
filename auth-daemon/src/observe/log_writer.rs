//! Writes the log on a thread of its own, so that a reader that stalls does not hold up connections. After a write, lines
//! gather for some milliseconds: to wake a thread for each line costs more than the line.

use std::{
    cell::Cell,
    io::{self, Write},
    mem,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

use tracing_subscriber::fmt::MakeWriter;

/// Maximum size of the lines that wait for the reader, in bytes. Further lines are lost, of whatever kind, and counted.
const MAX_WAITING: usize = 4 * 1024 * 1024;
/// Maximum size at which lines about connections that are in order are taken. What is left is for lines that matter more.
const MAX_YIELDING: usize = MAX_WAITING / 4 * 3;
/// Time for which lines gather.
const GATHER: Duration = Duration::from_millis(5);
/// Size of a buffer that is kept for the next lines, in bytes.
const KEPT: usize = 64 * 1024;
/// Time limit for the lines that wait when the daemon ends.
const LAST: Duration = Duration::from_secs(1);

static LOST: AtomicU64 = AtomicU64::new(0);

thread_local! {
    /// Maximum size of the lines that wait when this thread adds one.
    static ROOM: Cell<usize> = const { Cell::new(MAX_WAITING) };
}

/// Takes lines of the log.
#[derive(Clone, Debug, Default)]
pub(crate) struct Lines(Arc<Shared>);

/// Writes the lines that wait, for at most a second, when it is dropped.
#[derive(Debug)]
pub(crate) struct Last(Lines);

#[derive(Debug, Default)]
struct Shared {
    waiting: Mutex<Waiting>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Waiting {
    bytes: Vec<u8>,
    /// Whether no more lines will come.
    ended: bool,
    /// Whether the thread has written all.
    written: bool,
}

/// Returns a writer to standard error.
pub(crate) fn to_stderr() -> io::Result<(Lines, Last)> {
    start(io::stderr())
}

/// Number of lines that were lost since the start.
pub(crate) fn lost_lines() -> u64 {
    LOST.load(Ordering::Relaxed)
}

/// Writes lines that are lost before others if the log's reader stalls.
pub(crate) fn yielding(write: impl FnOnce()) {
    ROOM.set(MAX_YIELDING);
    write();
    ROOM.set(MAX_WAITING);
}

fn start(to: impl Write + Send + 'static) -> io::Result<(Lines, Last)> {
    let lines = Lines::default();
    let shared = lines.0.clone();
    thread::Builder::new()
        .name("log".to_owned())
        .spawn(move || shared.write_to(to))?;
    Ok((lines.clone(), Last(lines)))
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes lines until no more will come.
    fn write_to(&self, mut to: impl Write) {
        let mut batch = Vec::new();
        loop {
            let mut waiting = self
                .changed
                .wait_while(self.lock(), |waiting| {
                    waiting.bytes.is_empty() && !waiting.ended
                })
                .unwrap_or_else(PoisonError::into_inner);
            mem::swap(&mut batch, &mut waiting.bytes);
            if batch.is_empty() && waiting.ended {
                waiting.written = true;
                self.changed.notify_all();
                return;
            }
            drop(waiting);
            // If the log cannot be written, there is no one to report it to.
            let _ = to.write_all(&batch);
            batch.clear();
            batch.shrink_to(KEPT);
            // The first line after a while is written at once, and those that follow it closely together.
            thread::sleep(GATHER);
        }
    }
}

impl<'a> MakeWriter<'a> for Lines {
    type Writer = &'a Lines;

    fn make_writer(&'a self) -> Self::Writer {
        self
    }
}

impl Write for &Lines {
    /// Takes a whole line: each event of the log is written at once.
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let mut waiting = self.0.lock();
        if waiting.bytes.len() + line.len() > ROOM.get() {
            LOST.fetch_add(1, Ordering::Relaxed);
            return Ok(line.len());
        }
        let is_first = waiting.bytes.is_empty();
        waiting.bytes.extend_from_slice(line);
        drop(waiting);
        if is_first {
            self.0.changed.notify_all();
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Last {
    fn drop(&mut self) {
        let shared = &self.0.0;
        let mut waiting = shared.lock();
        waiting.ended = true;
        shared.changed.notify_all();
        let written = shared
            .changed
            .wait_timeout_while(waiting, LAST, |waiting| !waiting.written);
        drop(written);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    /// Sends what is written.
    struct Reader(mpsc::SyncSender<Vec<u8>>);

    impl Write for Reader {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.send(bytes.to_vec()).map_err(io::Error::other)?;
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn lines_arrive_whole_and_in_order() {
        let (sender, read) = mpsc::sync_channel(1000);
        let (lines, last) = start(Reader(sender)).unwrap();
        for number in 0..100 {
            writeln!(&lines, "{number}").unwrap();
        }
        drop(last);
        let expected: String = (0..100).map(|number| format!("{number}\n")).collect();
        // The thread ends, and drops the sender, when it has written all.
        let text: Vec<u8> = read.iter().flatten().collect();
        assert_eq!(String::from_utf8(text).unwrap(), expected);
    }

    #[test]
    fn a_reader_that_stalls_holds_up_nobody() {
        // A write waits for a receiver, and there is none.
        let (sender, read) = mpsc::sync_channel(0);
        let (lines, _last) = start(Reader(sender)).unwrap();
        let lost = lost_lines();
        let line = [b'x'; 1024];
        for _ in 0..3 * MAX_WAITING / line.len() {
            (&lines).write_all(&line).unwrap();
        }
        assert!(lost_lines() > lost);
        drop(read);
    }

    #[test]
    fn lines_that_yield_leave_room_for_others() {
        let (sender, read) = mpsc::sync_channel(0);
        let (lines, _last) = start(Reader(sender)).unwrap();
        let line = [b'x'; 1024];
        // Once the thread has taken a line, it waits for a reader, and takes no more.
        (&lines).write_all(&line).unwrap();
        while !lines.0.lock().bytes.is_empty() {
            thread::yield_now();
        }
        let fill = || {
            for _ in 0..3 * MAX_WAITING / line.len() {
                (&lines).write_all(&line).unwrap();
            }
            lines.0.lock().bytes.len()
        };
        yielding(|| assert_eq!(fill(), MAX_YIELDING));
        assert_eq!(fill(), MAX_WAITING);
        drop(read);
    }
}
