//! The connections of one listener, on all workers. They end when this is dropped.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use futures_util::FutureExt;
use tokio::{runtime::Handle, task::AbortHandle};

/// Tasks that are aborted together. A task that ends by itself removes its entry without waking another task.
#[derive(Debug, Default)]
pub(super) struct ConnectionTasks(Arc<Mutex<Running>>);

#[derive(Debug, Default)]
struct Running {
    /// `None` until the task is spawned.
    tasks: HashMap<u64, Option<AbortHandle>>,
    next: u64,
}

impl ConnectionTasks {
    /// Runs `connection` on `runtime`.
    pub(super) fn spawn(
        &self,
        runtime: &Handle,
        connection: impl Future<Output = ()> + Send + 'static,
    ) {
        let id = {
            let mut running = self.lock();
            running.next += 1;
            let id = running.next;
            running.tasks.insert(id, None);
            id
        };
        let leave = Leave(self.0.clone(), id);
        let task = runtime.spawn(leaving(connection, leave));
        // The task may already have ended.
        if let Some(place) = self.lock().tasks.get_mut(&id) {
            *place = Some(task.abort_handle());
        }
    }

    /// Whether all tasks have ended.
    pub(super) fn is_empty(&self) -> bool {
        self.lock().tasks.is_empty()
    }

    fn lock(&self) -> MutexGuard<'_, Running> {
        lock(&self.0)
    }
}

impl Drop for ConnectionTasks {
    fn drop(&mut self) {
        // Abort without the lock: a task that is dropped at once locks it to remove its entry.
        let tasks = std::mem::take(&mut self.lock().tasks);
        for task in tasks.into_values().flatten() {
            task.abort();
        }
    }
}

/// Runs `connection`, then removes its entry. Not an `async fn`, whose future would hold `connection` twice: it is most
/// of an idle connection's memory.
fn leaving(
    connection: impl Future<Output = ()> + Send,
    leave: Leave,
) -> impl Future<Output = ()> + Send {
    connection.map(move |()| drop(leave))
}

struct Leave(Arc<Mutex<Running>>, u64);

impl Drop for Leave {
    fn drop(&mut self) {
        lock(&self.0).tasks.remove(&self.1);
    }
}

fn lock(running: &Mutex<Running>) -> MutexGuard<'_, Running> {
    running.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::sync::oneshot;

    use super::*;

    #[tokio::test]
    async fn what_ends_is_forgotten() {
        let connections = ConnectionTasks::default();
        let (end, ended) = oneshot::channel();
        connections.spawn(&Handle::current(), async {
            let _ = ended.await;
        });
        connections.spawn(&Handle::current(), async { panic!("on purpose") });
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
        let leave = Leave(Arc::default(), 0);
        assert!(size_of_val(&leaving(connection, leave)) < size + 100);
    }

    #[tokio::test]
    async fn dropped_it_ends_them_all() {
        let connections = ConnectionTasks::default();
        let (held, ended) = oneshot::channel::<()>();
        connections.spawn(&Handle::current(), async {
            let _held = held;
            std::future::pending().await
        });
        tokio::task::yield_now().await;
        drop(connections);
        assert!(ended.await.is_err(), "the task and what it held are gone");
    }
}
