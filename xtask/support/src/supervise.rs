//! Long work on meshes that can be interrupted: it runs on a thread of its own and reports events, while the calling thread
//! handles them, stops a step that hangs, and cleans up after Ctrl-C.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use mesh_tests::remove_own;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

/// An event that work reports.
pub trait Event: Send + 'static {
    /// The name of the step that begins with this event, if one does. Each step has its own time limit.
    fn begins(&self) -> Option<&str>;
}

/// Runs `work` on a thread of its own until it ends, and calls `handle` with each of its events. Work that was asked to
/// stop must not begin another step.
///
/// # Errors
/// The errors of `handle` and `work`; if the process is interrupted, or a step takes longer than `longest`. After such an
/// error all meshes of this process are removed, which unblocks the running step.
pub fn supervise<E: Event>(
    longest: Duration,
    work: impl FnOnce(Sender<E>, &AtomicBool) -> Result<()> + Send + 'static,
    handle: impl FnMut(E) -> Result<()>,
) -> Result<()> {
    let interrupted = interrupts()?;
    let (sender, events) = channel();
    let stop = Arc::new(AtomicBool::new(false));
    let worker = thread::Builder::new()
        .name("work".to_owned())
        .spawn({
            let stop = Arc::clone(&stop);
            move || work(sender, &stop)
        })
        .context("cannot start a thread")?;
    let followed = follow(&events, longest, &interrupted, handle);
    if followed.is_err() {
        stop.store(true, Ordering::Relaxed);
        eprintln!("cleaning up");
        let _ = remove_own();
        let end = Instant::now() + CLEAN_UP;
        while events
            .recv_timeout(end.saturating_duration_since(Instant::now()))
            .is_ok()
        {}
        remove_own().context("cannot clean up")?;
    }
    followed?;
    worker
        .join()
        .map_err(|_| anyhow!("the thread that does the work panicked"))?
}

/// A flag that Ctrl-C, and requests to end the process, set.
///
/// # Errors
/// If the handlers cannot be installed.
pub fn interrupts() -> Result<Arc<AtomicBool>> {
    let interrupted = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM, SIGHUP] {
        signal_hook::flag::register(signal, Arc::clone(&interrupted))
            .context("cannot wait for signals")?;
    }
    Ok(interrupted)
}

/// Handles events until there are no more.
fn follow<E: Event>(
    events: &Receiver<E>,
    longest: Duration,
    interrupted: &AtomicBool,
    mut handle: impl FnMut(E) -> Result<()>,
) -> Result<()> {
    let mut current = String::new();
    let mut deadline = Instant::now() + longest;
    loop {
        match events.recv_timeout(POLL) {
            Ok(event) => {
                if let Some(name) = event.begins() {
                    name.clone_into(&mut current);
                    deadline = Instant::now() + longest;
                }
                handle(event)?;
            }
            Err(RecvTimeoutError::Disconnected) => return Ok(()),
            Err(RecvTimeoutError::Timeout) => {}
        }
        if interrupted.load(Ordering::Relaxed) {
            bail!("interrupted during {current}");
        }
        if Instant::now() > deadline {
            bail!("{current} did not end within {longest:?}");
        }
    }
}

/// How long a stopped step may take to notice it.
const CLEAN_UP: Duration = Duration::from_secs(10);
/// Interval at which Ctrl-C is checked.
const POLL: Duration = Duration::from_millis(100);

#[cfg(test)]
mod tests {
    use super::*;

    struct Begins(&'static str);

    impl Event for Begins {
        fn begins(&self) -> Option<&str> {
            Some(self.0)
        }
    }

    fn followed(longest: Duration, interrupted: bool) -> String {
        let (sender, events) = channel();
        sender.send(Begins("the step")).unwrap();
        let interrupted = AtomicBool::new(interrupted);
        let result = follow(&events, longest, &interrupted, |_| Ok(()));
        result.unwrap_err().to_string()
    }

    #[test]
    fn a_step_that_hangs_is_named() {
        let error = followed(Duration::ZERO, false);
        assert!(error.contains("the step did not end"), "{error}");
    }

    #[test]
    fn an_interrupted_step_is_named() {
        let error = followed(Duration::from_secs(60), true);
        assert!(error.contains("interrupted during the step"), "{error}");
    }

    #[test]
    fn the_error_of_the_work_is_returned() {
        let begun = |events: Sender<Begins>, _: &AtomicBool| {
            let _ = events.send(Begins("one"));
            Err(anyhow!("no disk"))
        };
        let mut seen = 0;
        let result = supervise(Duration::from_secs(60), begun, |_| {
            seen += 1;
            Ok(())
        });
        assert_eq!(
            (result.unwrap_err().to_string(), seen),
            ("no disk".to_owned(), 1)
        );
    }
}
