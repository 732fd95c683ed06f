//! A queue in front of work that takes a processor: each key has a turn, however much work another key has in it.

use std::{
    collections::{HashMap, VecDeque},
    future::poll_fn,
    hash::Hash,
    pin::pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Poll, Waker},
};

use tokio::sync::oneshot;

/// Gives turns to keys in rotation. Requests of one key have theirs in order.
#[derive(Debug)]
pub struct FairQueue<K: Key> {
    /// Most turns of one key at the same time.
    most_of_key: usize,
    state: Mutex<State<K>>,
}

/// What turns are given to: a caller's address or name.
pub trait Key: Clone + Eq + Hash {}

impl<K: Clone + Eq + Hash> Key for K {}

#[derive(Debug)]
struct State<K: Key> {
    /// Free turns.
    free: usize,
    keys: HashMap<K, Entry<K>>,
    /// Keys that wait and may have another turn, the next one first.
    rotation: VecDeque<K>,
}

#[derive(Debug)]
struct Entry<K: Key> {
    /// Turns in progress.
    taken: usize,
    waiting: VecDeque<oneshot::Sender<Turn<K>>>,
    in_rotation: bool,
}

/// A turn, until it is dropped.
#[derive(Debug)]
pub struct Turn<K: Key> {
    queue: Arc<FairQueue<K>>,
    key: K,
}

impl<K: Key> FairQueue<K> {
    /// A queue with `turns` at the same time, of which one key has at most `most_of_key`.
    pub fn new(turns: usize, most_of_key: usize) -> Arc<Self> {
        Arc::new(Self {
            most_of_key,
            state: Mutex::new(State {
                free: turns,
                keys: HashMap::new(),
                rotation: VecDeque::new(),
            }),
        })
    }

    /// A queue with as many turns at the same time as there are processors.
    pub fn of_processors() -> Arc<Self> {
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        Self::new(processors, processors)
    }

    /// Waits for a turn of `key`. A caller that stops waiting leaves the queue.
    pub async fn turn(self: &Arc<Self>, key: &K) -> Turn<K> {
        loop {
            // The sender is dropped only with the queue, which `self` keeps.
            if let Ok(turn) = self.enter(key).await {
                return turn;
            }
        }
    }

    /// Runs `work` with a turn of the key that `key` returns for each of its polls, so that others get theirs between
    /// two polls.
    pub async fn run<F: Future>(self: Arc<Self>, key: impl Fn() -> K, work: F) -> F::Output {
        let mut work = pin!(work);
        loop {
            let given = self.enter(&key());
            // A turn is free whenever this is polled. Others that are ready come first, and enter the queue as well;
            // otherwise the runtime's queue, which is not fair, would decide.
            suspend(Waker::wake_by_ref).await;
            let Ok(turn) = given.await else { continue };
            let polled = poll_fn(|context| Poll::Ready(work.as_mut().poll(context))).await;
            drop(turn);
            if let Poll::Ready(output) = polled {
                return output;
            }
            // Until `work` wakes this task.
            suspend(|_| ()).await;
        }
    }

    fn enter(self: &Arc<Self>, key: &K) -> oneshot::Receiver<Turn<K>> {
        let (give, given) = oneshot::channel();
        let mut state = self.lock();
        let entry = state.keys.entry(key.clone()).or_insert_with(Entry::new);
        entry.waiting.push_back(give);
        state.rotate(key, self.most_of_key);
        let unclaimed = self.give(&mut state);
        drop(state);
        // Not under the lock, because dropping a turn takes it.
        drop(unclaimed);
        given
    }

    /// Gives free turns to those that wait. Returns turns whose receiver has stopped waiting.
    fn give(self: &Arc<Self>, state: &mut State<K>) -> Vec<Turn<K>> {
        let mut unclaimed = Vec::new();
        while state.free > 0 {
            let Some(key) = state.rotation.pop_front() else {
                break;
            };
            let Some(entry) = state.keys.get_mut(&key) else {
                continue;
            };
            entry.in_rotation = false;
            // Those that stopped waiting have dropped their receiver.
            let next = loop {
                match entry.waiting.pop_front() {
                    Some(waiting) if waiting.is_closed() => {}
                    next => break next,
                }
            };
            if let Some(next) = next {
                entry.taken += 1;
                state.free -= 1;
                let turn = Turn {
                    queue: self.clone(),
                    key: key.clone(),
                };
                unclaimed.extend(next.send(turn).err());
            }
            state.rotate(&key, self.most_of_key);
        }
        unclaimed
    }

    fn lock(&self) -> MutexGuard<'_, State<K>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Returns to the runtime once, until the task is woken. `wake` may arrange for that.
async fn suspend(wake: impl Fn(&Waker)) {
    let mut suspended = false;
    poll_fn(|context| {
        if suspended {
            return Poll::Ready(());
        }
        suspended = true;
        wake(context.waker());
        Poll::Pending
    })
    .await;
}

impl<K: Key> State<K> {
    /// Puts `key` at the end of the rotation if it waits and may have another turn; forgets it if it has no request.
    fn rotate(&mut self, key: &K, most_of_key: usize) {
        let Some(entry) = self.keys.get_mut(key) else {
            return;
        };
        if entry.waiting.is_empty() {
            if entry.taken == 0 && !entry.in_rotation {
                self.keys.remove(key);
            }
        } else if !entry.in_rotation && entry.taken < most_of_key {
            entry.in_rotation = true;
            self.rotation.push_back(key.clone());
        }
    }
}

impl<K: Key> Entry<K> {
    fn new() -> Self {
        Self {
            taken: 0,
            waiting: VecDeque::new(),
            in_rotation: false,
        }
    }
}

impl<K: Key> Drop for Turn<K> {
    fn drop(&mut self) {
        let mut state = self.queue.lock();
        state.free += 1;
        if let Some(entry) = state.keys.get_mut(&self.key) {
            entry.taken -= 1;
        }
        state.rotate(&self.key, self.queue.most_of_key);
        let unclaimed = self.queue.give(&mut state);
        drop(state);
        drop(unclaimed);
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::atomic::{AtomicUsize, Ordering},
        task::Context,
    };

    use futures_util::{FutureExt, task::noop_waker_ref};
    use proptest::prelude::*;
    use tokio::task::JoinHandle;

    use super::*;

    type Waiting = std::pin::Pin<Box<dyn Future<Output = Turn<u8>>>>;

    fn wait(queue: &Arc<FairQueue<u8>>, key: u8) -> Waiting {
        let queue = queue.clone();
        let mut waiting: Waiting = Box::pin(async move { queue.turn(&key).await });
        // Enters the queue.
        let entered = pin!(&mut waiting).poll(&mut Context::from_waker(noop_waker_ref()));
        match entered {
            std::task::Poll::Ready(turn) => Box::pin(std::future::ready(turn)),
            std::task::Poll::Pending => waiting,
        }
    }

    #[test]
    fn a_key_waits_for_one_turn_of_another_that_has_a_thousand_requests() {
        let queue = FairQueue::new(1, 1);
        let mut flood: VecDeque<_> = (0..1000).map(|_| wait(&queue, 1)).collect();
        let mut neighbour = wait(&queue, 2);
        let first = flood.pop_front().unwrap().now_or_never().unwrap();
        assert!((&mut neighbour).now_or_never().is_none());
        drop(first);
        // The rotation was made when the first of the flood came in, so one more of it may be ahead.
        let second = flood.pop_front().unwrap().now_or_never();
        drop(second);
        assert!(neighbour.now_or_never().is_some());
    }

    #[test]
    fn one_key_does_not_have_all_turns() {
        let queue = FairQueue::new(4, 2);
        let turns: Vec<_> = (0..4).map(|_| wait(&queue, 1).now_or_never()).collect();
        assert_eq!(turns.iter().flatten().count(), 2);
        assert!(wait(&queue, 2).now_or_never().is_some());
    }

    /// A thousand tasks of one key that always have something to do, and one task of another key, on one thread.
    #[tokio::test]
    async fn a_key_is_polled_after_a_few_polls_of_another_that_has_a_thousand_tasks() {
        let queue = FairQueue::new(1, 1);
        let polls = Arc::new(AtomicUsize::new(0));
        let flood: Vec<_> = (0..1000)
            .map(|_| {
                let (queue, polls) = (queue.clone(), polls.clone());
                let busy = async move {
                    loop {
                        polls.fetch_add(1, Ordering::SeqCst);
                        suspend(Waker::wake_by_ref).await;
                    }
                };
                tokio::spawn(queue.run(|| "flood", busy))
            })
            .collect();
        while polls.load(Ordering::SeqCst) < 5000 {
            tokio::task::yield_now().await;
        }
        let counted = polls.clone();
        let neighbour = async move {
            let mut between = Vec::new();
            for _ in 0..100 {
                let before = counted.load(Ordering::SeqCst);
                suspend(Waker::wake_by_ref).await;
                between.push(counted.load(Ordering::SeqCst) - before);
            }
            between
        };
        let neighbour = tokio::spawn(queue.run(|| "neighbour", neighbour));
        let between = neighbour.await.unwrap();
        assert!(between.iter().all(|polls| *polls <= 4), "{between:?}");
        flood.iter().for_each(JoinHandle::abort);
    }

    proptest! {
        #[test]
        fn turns_are_bounded_and_continue_until_nothing_waits(
            steps in prop::collection::vec((0_u8..4, 0_u8..3), 1..200),
        ) {
            let (turns, most_of_key) = (3, 2);
            let queue = FairQueue::new(turns, most_of_key);
            let mut waiting: Vec<Waiting> = Vec::new();
            let mut held: Vec<Turn<u8>> = Vec::new();
            for (key, step) in steps {
                match step {
                    0 => waiting.push(wait(&queue, key)),
                    // Stops waiting.
                    1 => drop((!waiting.is_empty()).then(|| waiting.remove(key as usize % waiting.len()))),
                    _ => drop((!held.is_empty()).then(|| held.remove(key as usize % held.len()))),
                }
                waiting.retain_mut(|waiting| match waiting.now_or_never() {
                    Some(turn) => { held.push(turn); false }
                    None => true,
                });
                prop_assert!(held.len() <= turns);
                for key in 0..4 {
                    let of_key = held.iter().filter(|turn| turn.key == key).count();
                    prop_assert!(of_key <= most_of_key);
                }
            }
            while !waiting.is_empty() {
                held.clear();
                let before = waiting.len();
                waiting.retain_mut(|waiting| match waiting.now_or_never() {
                    Some(turn) => { held.push(turn); false }
                    None => true,
                });
                prop_assert!(waiting.len() < before, "a request waits although turns are free");
            }
            held.clear();
            let state = queue.lock();
            prop_assert_eq!(state.free, turns);
            prop_assert!(state.keys.is_empty() && state.rotation.is_empty(), "{:?}", *state);
        }
    }
}
