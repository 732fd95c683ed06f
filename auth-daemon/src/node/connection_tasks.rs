//! The connections of one listener, on all workers, and the turns in which a worker serves them.
//!
//! On each worker, one task polls all connections of a listener, for a turn, and then lets the worker's other tasks run. A
//! pod with thousands of connections that have something to do therefore delays another pod's by a turn, not by thousands
//! of polls.

use std::{
    cell::Cell,
    collections::HashMap,
    future::poll_fn,
    panic::AssertUnwindSafe,
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll},
    time::{Duration, Instant},
};

use futures_util::{FutureExt, StreamExt, stream::FuturesUnordered};
use tokio::{sync::mpsc, task::yield_now};

use super::{precedence, workers::Worker};
use crate::proxy::work::Work;

/// Time after which a listener's connections let those of others run. One poll of a connection is not interrupted: it takes a
/// few microseconds, or a millisecond for a step of a TLS handshake.
const TURN: Duration = Duration::from_micros(100);

/// Tasks that end together, when this is dropped.
#[derive(Debug)]
pub(super) struct ConnectionTasks {
    work: Arc<Work>,
    /// By the number of the worker.
    groups: Mutex<HashMap<usize, mpsc::UnboundedSender<Connection>>>,
    open: Arc<AtomicUsize>,
}

type Connection = Pin<Box<dyn Future<Output = ()> + Send>>;

impl ConnectionTasks {
    /// Creates an empty set of tasks, whose work is added to `work`.
    pub(super) fn new(work: Arc<Work>) -> Self {
        Self {
            work,
            groups: Mutex::default(),
            open: Arc::default(),
        }
    }

    /// Runs `connection` on `worker`, and drops `charged` when it has ended.
    pub(super) fn spawn(
        &self,
        worker: &Worker,
        charged: impl Send + 'static,
        connection: impl Future<Output = ()> + Send + 'static,
    ) {
        self.open.fetch_add(1, Ordering::Relaxed);
        let connection = leaving(connection, (charged, Open(self.open.clone())));
        // A panic is logged where it happens, and ends this connection alone.
        let connection = AssertUnwindSafe(connection).catch_unwind().map(drop);
        let mut groups = self.groups.lock().unwrap_or_else(PoisonError::into_inner);
        let group = groups.entry(worker.number).or_insert_with(|| {
            let (group, arriving) = mpsc::unbounded_channel();
            worker.runtime.spawn(serve(arriving, self.work.clone()));
            group
        });
        // A worker that has ended drops the connection.
        let _ = group.send(Box::pin(connection));
    }

    /// Whether all tasks have ended.
    pub(super) fn is_empty(&self) -> bool {
        self.open.load(Ordering::Relaxed) == 0
    }
}

/// Serves the connections of one listener on one worker. Ends, with all connections, when the sender is dropped.
async fn serve(mut arriving: mpsc::UnboundedReceiver<Connection>, work: Arc<Work>) {
    let mut connections = FuturesUnordered::new();
    poll_fn(|context| {
        let began = begin_turn();
        loop {
            match arriving.poll_recv(context) {
                Poll::Ready(Some(connection)) => connections.push(InTurn(connection)),
                Poll::Ready(None) => return Poll::Ready(()),
                Poll::Pending => break,
            }
        }
        while let Poll::Ready(Some(())) = connections.poll_next_unpin(context) {
            if is_turn_over() {
                context.waker().wake_by_ref();
                break;
            }
        }
        let now = Instant::now();
        precedence::turn_ended(work.add(began, now), work.is_busy_at(now), now);
        Poll::Pending
    })
    .await;
    begin_turn();
    for connection in connections {
        drop(connection);
        if is_turn_over() {
            yield_now().await;
            begin_turn();
        }
    }
}

/// A connection that waits for the next turn if this one is over. After two that wait, `FuturesUnordered` lets the worker's
/// other tasks run.
struct InTurn(Connection);

impl Future for InTurn {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        if is_turn_over() {
            context.waker().wake_by_ref();
            return Poll::Pending;
        }
        self.0.as_mut().poll(context)
    }
}

thread_local! {
    /// When the turn of the listener that this thread serves began.
    static TURN_BEGAN: Cell<Option<Instant>> = const { Cell::new(None) };
}

fn begin_turn() -> Instant {
    let now = Instant::now();
    TURN_BEGAN.set(Some(now));
    now
}

fn is_turn_over() -> bool {
    TURN_BEGAN
        .get()
        .is_some_and(|began| began.elapsed() >= TURN)
}

/// Runs `connection`, then drops `held`. Not an `async fn`, whose future would hold both twice.
fn leaving(
    connection: impl Future<Output = ()> + Send,
    held: impl Send,
) -> impl Future<Output = ()> + Send {
    connection.map(move |()| drop(held))
}

struct Open(Arc<AtomicUsize>);

impl Drop for Open {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::sync::oneshot;

    use super::*;
    use crate::node::Workers;

    #[tokio::test]
    async fn what_ends_is_forgotten() {
        let workers = Workers::start(2).unwrap();
        let connections = ConnectionTasks::new(Arc::default());
        let (end, ended) = oneshot::channel();
        connections.spawn(workers.next(false), (), async {
            let _ = ended.await;
        });
        connections.spawn(workers.next(false), (), async { panic!("on purpose") });
        assert!(!connections.is_empty());
        end.send(()).unwrap();
        while !connections.is_empty() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    #[test]
    fn a_connection_takes_its_room_once() {
        let connection = async {
            let state = [0_u8; 1000];
            tokio::task::yield_now().await;
            std::hint::black_box(&state);
        };
        let size = size_of_val(&connection);
        assert!(size >= 1000);
        let open = Open(Arc::default());
        assert!(size_of_val(&leaving(connection, open)) < size + 100);
    }

    #[tokio::test]
    async fn dropped_it_ends_them_all() {
        let workers = Workers::start(1).unwrap();
        let connections = ConnectionTasks::new(Arc::default());
        let mut waiting = Vec::new();
        for _ in 0..1000 {
            let (held, ended) = oneshot::channel::<()>();
            waiting.push(ended);
            connections.spawn(workers.next(false), (), async {
                let _held = held;
                std::future::pending().await
            });
        }
        drop(connections);
        for ended in waiting {
            assert!(ended.await.is_err(), "the task and what it held are gone");
        }
    }

    /// Counts polls instead of time: between two polls of the neighbour there are a few of the thousand others, not a
    /// thousand.
    #[tokio::test]
    async fn a_neighbour_waits_for_a_turn_and_not_for_every_connection() {
        const GREEDY: usize = 1000;
        const ROUNDS: usize = 20;
        let workers = Workers::start(1).unwrap();
        let worker = workers.next(false);
        let (greedy, neighbour) = (
            ConnectionTasks::new(Arc::default()),
            ConnectionTasks::new(Arc::default()),
        );
        let polls = Arc::new(AtomicUsize::new(0));
        for _ in 0..GREEDY {
            let polls = polls.clone();
            greedy.spawn(worker, (), async move {
                loop {
                    let start = Instant::now();
                    while start.elapsed() < TURN / 10 {}
                    polls.fetch_add(1, Ordering::Relaxed);
                    yield_now().await;
                }
            });
        }
        while polls.load(Ordering::Relaxed) < GREEDY {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let (done, waited) = oneshot::channel();
        neighbour.spawn(worker, (), async move {
            let before = polls.load(Ordering::Relaxed);
            for _ in 0..ROUNDS {
                yield_now().await;
            }
            let _ = done.send(polls.load(Ordering::Relaxed) - before);
        });
        let between = waited.await.unwrap() / ROUNDS;
        assert!(between < GREEDY / 10, "{between} polls between two");
    }
}
