//! The data path's threads: two per core, one for busy listeners and one for the others (`proxy::work`), which the kernel
//! prefers. A connection stays on one thread from its first byte to its last: its events wake only that thread, and its
//! data does not move between cores.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread::{self, ThreadId},
};

use tokio::{
    runtime::{Builder, Handle},
    sync::watch,
    time::{MissedTickBehavior, interval},
};

use super::precedence;
use super::pulse::{BEAT, Beats, Pulse};
use crate::proxy::handshakes::{self, Turns};

/// Number of tasks that a worker runs before it looks for new events.
const TURNS_BETWEEN_EVENTS: u32 = 8;

/// The worker threads.
#[derive(Debug)]
pub struct Workers {
    quiet: Vec<Worker>,
    /// Those for busy listeners.
    busy: Vec<Worker>,
    /// Index of the worker that gets the next listener.
    next: AtomicUsize,
    /// Ends the threads when it is dropped.
    _stop: watch::Sender<()>,
}

/// A thread with a runtime of its own.
#[derive(Debug)]
pub(super) struct Worker {
    pub(super) number: usize,
    pub(super) runtime: Handle,
    /// For the handshakes of its inbound connections.
    pub(super) turns: Turns,
    thread: ThreadId,
    /// Number of the worker's connections.
    load: Arc<AtomicUsize>,
    beats: Beats,
}

impl Workers {
    /// Starts `count` threads that the kernel prefers, and as many for busy listeners. They end, with all their tasks, when
    /// this is dropped.
    pub fn start(count: usize) -> io::Result<Self> {
        let (stop, stopped) = watch::channel(());
        let count = count.max(1);
        let start = |number| Worker::start(number, number < count, stopped.clone());
        Ok(Self {
            quiet: (0..count).map(start).collect::<io::Result<_>>()?,
            busy: (count..2 * count).map(start).collect::<io::Result<_>>()?,
            next: AtomicUsize::new(0),
            _stop: stop,
        })
    }

    /// Returns the threads' heartbeats.
    pub fn pulse(&self) -> Pulse {
        let workers = self.quiet.iter().chain(&self.busy);
        Pulse::of(workers.map(|worker| worker.beats.clone()))
    }

    /// Returns a worker for a long-lived task, round-robin, of those for busy listeners or of the others.
    pub(super) fn next(&self, of_busy: bool) -> &Worker {
        let workers = if of_busy { &self.busy } else { &self.quiet };
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        &workers[number % workers.len()]
    }

    /// Returns the worker with the fewest connections, of those for busy listeners or of the others. On a tie, prefers the
    /// calling thread's worker.
    pub(super) fn idlest(&self, of_busy: bool) -> &Worker {
        let workers = if of_busy { &self.busy } else { &self.quiet };
        let load = |worker: &Worker| {
            let elsewhere = !worker.is_current();
            (worker.load.load(Ordering::Relaxed), elsewhere)
        };
        let idlest = workers.iter().min_by_key(|worker| load(worker));
        idlest.unwrap_or(&workers[0])
    }
}

impl Worker {
    fn start(
        number: usize,
        is_preferred: bool,
        mut stopped: watch::Receiver<()>,
    ) -> io::Result<Self> {
        // A listener with much to do always has a task that is ready. What arrives meanwhile, from the sockets or from other
        // threads, waits for a few turns.
        let runtime = Builder::new_current_thread()
            .enable_all()
            .event_interval(TURNS_BETWEEN_EVENTS)
            .global_queue_interval(TURNS_BETWEEN_EVENTS)
            .build()?;
        let handle = runtime.handle().clone();
        let beats = Beats::new();
        let heart = beats.clone();
        let thread = thread::Builder::new()
            .name(format!("data-path-{number}"))
            .spawn(move || {
                if is_preferred && let Err(error) = precedence::begin() {
                    tracing::warn!(
                        number, %error,
                        "a thread for quiet pods has no precedence over those for busy pods; grant CAP_SYS_NICE"
                    );
                }
                runtime.block_on(async {
                    let mut ticks = interval(BEAT);
                    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
                    loop {
                        tokio::select! {
                            _ = ticks.tick() => heart.beat(),
                            // Nothing is ever sent, so this means that the sender was dropped.
                            _ = stopped.changed() => break,
                        }
                    }
                });
                runtime.shutdown_background();
            })?;
        Ok(Self {
            number,
            runtime: handle,
            turns: handshakes::turns_of_worker(),
            thread: thread.thread().id(),
            load: Arc::default(),
            beats,
        })
    }

    /// Whether this worker runs on the calling thread.
    pub(super) fn is_current(&self) -> bool {
        self.thread == thread::current().id()
    }

    /// Counts a connection until the guard is dropped.
    pub(super) fn count(&self) -> Load {
        self.load.fetch_add(1, Ordering::Relaxed);
        Load(self.load.clone())
    }
}

/// Guard returned by [`Worker::count`].
pub(super) struct Load(Arc<AtomicUsize>);

impl Drop for Load {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn connections_go_to_the_worker_with_the_fewest() {
        let workers = Workers::start(3).unwrap();
        let first = workers.idlest(false);
        let busy = [first.count(), first.count()];
        let second = workers.idlest(false);
        assert_ne!(second.thread, first.thread);
        let one = second.count();
        let third = workers.idlest(false);
        assert!(third.thread != first.thread && third.thread != second.thread);
        let two = [third.count(), third.count()];
        assert_eq!(workers.idlest(false).thread, second.thread);
        drop((one, two));
        assert_ne!(workers.idlest(false).thread, first.thread);
        drop(busy);
    }

    #[test]
    fn busy_listeners_have_workers_of_their_own() {
        let workers = Workers::start(1).unwrap();
        let held = workers.idlest(true).count();
        assert_ne!(workers.idlest(false).number, workers.idlest(true).number);
        drop(held);
    }

    #[tokio::test]
    async fn of_equals_the_one_that_asks_keeps_it() {
        let workers = Arc::new(Workers::start(4).unwrap());
        for _ in 0..4 {
            let asked = workers.clone();
            let worker = workers.next(false);
            let local = worker
                .runtime
                .spawn(async move { asked.idlest(false).is_current() });
            assert!(local.await.unwrap());
        }
    }
}
