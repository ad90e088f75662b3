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

type Operation = Arc<dyn Fn(&mut Team) + Send + Sync>;

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
    /// Queues that nobody holds any more.
    released: Vec<usize>,
    /// A queue whose operations are being recorded instead of run, and those so far.
    capture: Option<(usize, Vec<Operation>)>,
}

/// Operations recorded once, to be issued again and again.
#[derive(Clone)]
pub struct Graph(Arc<[Operation]>);

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
        let (lanes, released) = (Vec::new(), Vec::new());
        let state = State { lanes, last: 0, schedule, released, capture: None };
        Executor { state: Mutex::new(state), team: Mutex::new(Team::new(threads)) }
    }

    pub fn new_queue(&self) -> usize {
        let mut state = lock(&self.state);
        if let Some(queue) = state.released.pop() {
            return queue;
        }
        state.lanes.push(Lane::default());
        state.lanes.len() - 1
    }

    /// The next new queue may be this one: what was issued on it still runs.
    pub fn release_queue(&self, queue: usize) {
        lock(&self.state).released.push(queue);
    }

    fn push(&self, queue: usize, item: Item) {
        lock(&self.state).lanes[queue].items.push_back(item);
    }

    pub fn issue(&self, queue: usize, operation: impl Fn(&mut Team) + Send + Sync + 'static) {
        let operation: Operation = Arc::new(operation);
        match &mut lock(&self.state).capture {
            Some((captured, operations)) if *captured == queue => return operations.push(operation),
            _ => {}
        }
        self.push(queue, Item::Run(operation));
    }

    pub fn begin_capture(&self, queue: usize) -> Result<(), Error> {
        let mut state = lock(&self.state);
        if state.capture.is_some() {
            return Err(Error::Capture("another capture is under way".into()));
        }
        state.capture = Some((queue, Vec::new()));
        Ok(())
    }

    pub fn end_capture(&self, queue: usize) -> Result<Graph, Error> {
        match lock(&self.state).capture.take() {
            Some((captured, operations)) if captured == queue => Ok(Graph(operations.into())),
            _ => Err(Error::Capture("this queue was not being captured".into())),
        }
    }

    pub fn replay(&self, queue: usize, graph: &Graph) {
        graph.0.iter().for_each(|operation| self.push(queue, Item::Run(operation.clone())));
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
                    operation.as_ref()(&mut team);
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
    fn a_captured_queue_runs_when_replayed() {
        let executor = Executor::new(1, Schedule::Steady);
        let (queue, other) = (executor.new_queue(), executor.new_queue());
        let (send, receive) = mpsc::channel();
        let issue = |queue, what| {
            let send = send.clone();
            executor.issue(queue, move |_| send.send(what).unwrap());
        };
        executor.begin_capture(queue).unwrap();
        assert!(matches!(executor.begin_capture(other), Err(Error::Capture(_))));
        issue(queue, 'a');
        issue(other, 'o');
        issue(queue, 'b');
        let graph = executor.end_capture(queue).unwrap();
        assert!(matches!(executor.end_capture(queue), Err(Error::Capture(_))));
        executor.synchronize(queue).unwrap();
        executor.synchronize(other).unwrap();
        assert_eq!(receive.try_iter().collect::<String>(), "o");
        executor.replay(queue, &graph);
        executor.replay(queue, &graph);
        executor.synchronize(queue).unwrap();
        assert_eq!(receive.try_iter().collect::<String>(), "abab");
    }

    #[test]
    fn a_wait_for_nothing_is_an_error() {
        let executor = Executor::new(1, Schedule::Steady);
        let queue = executor.new_queue();
        executor.wait(queue, &Event(Arc::default()));
        assert!(matches!(executor.synchronize(queue), Err(Error::Deadlock)));
    }
}
