//! Queues and events on a CPU: lists of operations that whoever waits for a result works off.
//!
//! One operation at a time runs, on the whole [`Team`]; queues decide only what may come next. So overlapping two
//! prefills costs nothing and gains nothing here, but it is the same code path as on a GPU, and a seeded schedule
//! ([`Schedule::Seeded`]) shows a forgotten event as a wrong result.

use super::team::Team;
use crate::backend::Error;
use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
    time::{Duration, Instant},
};

type Operation = Box<dyn FnOnce(&mut Team) + Send>;

enum Item {
    Run(Operation),
    Record(Event),
    Wait(Event),
}

/// A point in a queue; done once everything before it is.
#[derive(Clone)]
pub struct Event(Arc<OnceLock<Stamp>>);

struct Stamp {
    at: Instant,
    /// Time the recording queue had spent working until then.
    busy: Duration,
}

impl Event {
    /// Work that the recording queue did between two of its events; `None` until both are done.
    pub fn busy_since(&self, earlier: &Event) -> Option<Duration> {
        Some(self.0.get()?.busy.saturating_sub(earlier.0.get()?.busy))
    }

    /// When the point was reached; `None` until then.
    pub fn done_at(&self) -> Option<Instant> {
        Some(self.0.get()?.at)
    }
}

/// Which of several ready queues goes next.
#[derive(Clone, Copy, Debug)]
pub enum Schedule {
    /// The one that ran last while it can, else the oldest.
    Steady,
    /// A random one after every operation.
    Seeded(u64),
}

#[derive(Default)]
struct Lane {
    items: VecDeque<Item>,
    busy: Duration,
}

struct State {
    lanes: Vec<Lane>,
    last: usize,
    schedule: Schedule,
}

impl State {
    /// Index of a queue whose next item may run.
    fn next(&mut self) -> Option<usize> {
        let ready = |lane: &Lane| match lane.items.front() {
            None => false,
            Some(Item::Wait(event)) => event.0.get().is_some(),
            Some(_) => true,
        };
        match &mut self.schedule {
            Schedule::Steady if ready(&self.lanes[self.last]) => {}
            Schedule::Steady => self.last = self.lanes.iter().position(ready)?,
            Schedule::Seeded(state) => {
                let all: Vec<usize> = (0..self.lanes.len()).filter(|&i| ready(&self.lanes[i])).collect();
                if all.is_empty() {
                    return None;
                }
                *state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                self.last = all[(*state >> 33) as usize % all.len()];
            }
        }
        Some(self.last)
    }
}

pub(super) struct Executor {
    state: Mutex<State>,
    team: Mutex<Team>,
}

/// A panic in an operation leaves data half computed but the lists intact: later work may go on.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Executor {
    pub fn new(threads: usize, schedule: Schedule) -> Executor {
        let state = State { lanes: Vec::new(), last: 0, schedule };
        Executor { state: Mutex::new(state), team: Mutex::new(Team::new(threads)) }
    }

    pub fn new_queue(&self) -> usize {
        let mut state = lock(&self.state);
        state.lanes.push(Lane::default());
        state.lanes.len() - 1
    }

    fn push(&self, queue: usize, item: Item) {
        lock(&self.state).lanes[queue].items.push_back(item);
    }

    pub fn issue(&self, queue: usize, operation: impl FnOnce(&mut Team) + Send + 'static) {
        self.push(queue, Item::Run(Box::new(operation)));
    }

    pub fn record(&self, queue: usize) -> Event {
        let event = Event(Arc::default());
        self.push(queue, Item::Record(event.clone()));
        event
    }

    pub fn wait(&self, queue: usize, event: &Event) {
        self.push(queue, Item::Wait(event.clone()));
    }

    /// Works until everything issued on `queue` so far is done.
    pub fn synchronize(&self, queue: usize) -> Result<(), Error> {
        let target = self.record(queue);
        let mut team = lock(&self.team);
        while target.0.get().is_none() {
            let (lane, item) = {
                let mut state = lock(&self.state);
                let lane = state.next().ok_or(Error::Deadlock)?;
                (lane, state.lanes[lane].items.pop_front().expect("a ready queue has an item"))
            };
            match item {
                Item::Wait(_) => {}
                Item::Record(event) => {
                    let busy = lock(&self.state).lanes[lane].busy;
                    // Each event is recorded once, by the queue that made it.
                    event.0.get_or_init(|| Stamp { at: Instant::now(), busy });
                }
                Item::Run(operation) => {
                    let start = Instant::now();
                    operation(&mut team);
                    lock(&self.state).lanes[lane].busy += start.elapsed();
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    #[test]
    fn events_order_queues_under_any_schedule() {
        for seed in 0..20 {
            let executor = Executor::new(2, Schedule::Seeded(seed));
            let (a, b) = (executor.new_queue(), executor.new_queue());
            let (send, receive) = mpsc::channel();
            for i in 0..10 {
                let first = send.clone();
                executor.issue(a, move |_| first.send((i, 'a')).unwrap());
                executor.wait(b, &executor.record(a));
                let second = send.clone();
                executor.issue(b, move |_| second.send((i, 'b')).unwrap());
            }
            executor.synchronize(b).unwrap();
            let order: Vec<(i32, char)> = receive.try_iter().collect();
            assert_eq!(order.len(), 20);
            for i in 0..10 {
                let at = |what| order.iter().position(|&entry| entry == (i, what)).unwrap();
                assert!(at('a') < at('b'), "seed {seed}: {order:?}");
            }
        }
    }

    #[test]
    fn a_wait_for_nothing_is_an_error() {
        let executor = Executor::new(1, Schedule::Steady);
        let queue = executor.new_queue();
        executor.wait(queue, &Event(Arc::default()));
        assert!(matches!(executor.synchronize(queue), Err(Error::Deadlock)));
    }
}
