//! The team of threads that runs one operation at a time: a fork and join that costs about a microsecond.
//!
//! A decode step is hundreds of operations of a few microseconds each, so the members spin between operations and
//! only sleep when nothing has come for a while.

use std::{
    cell::UnsafeCell,
    hint,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::*},
    },
    thread::{self, JoinHandle, Thread},
};

/// Spins before a member goes to sleep: some tens of microseconds.
const SPINS: u32 = 20_000;
/// Spins before the leader, waiting for a member in the middle of a task, gives its core away.
const PATIENCE: u32 = 1_000;

type Job = *const (dyn Fn(usize) + Sync);

struct Shared {
    /// Number of the operation (high half), [`OPEN`], and how many members are at work on it (below).
    state: AtomicU64,
    /// Next task to hand out, and how many there are.
    next: AtomicUsize,
    tasks: AtomicUsize,
    job: UnsafeCell<Option<Job>>,
    panicked: AtomicBool,
    stop: AtomicBool,
    asleep: Vec<AtomicBool>,
}

/// Members may join. The leader closes an operation when it finds no task left: a member that comes late, because
/// something else had its core, is not waited for.
const OPEN: u64 = 1 << 31;

fn operation(state: u64) -> u64 {
    state >> 32
}

fn at_work(state: u64) -> u64 {
    state & (OPEN - 1)
}

// SAFETY: `job` is written only by the leader while the operation is closed and no member is at work, and read by
// members that have joined an open one, which synchronizes with the store that opened it.
unsafe impl Sync for Shared {}
// SAFETY: the raw pointer in `job` is only dereferenced while `Team::run` keeps its referent alive.
unsafe impl Send for Shared {}

impl Shared {
    fn work(&self, job: &(dyn Fn(usize) + Sync)) {
        let tasks = self.tasks.load(Relaxed);
        loop {
            let task = self.next.fetch_add(1, Relaxed);
            if task >= tasks {
                return;
            }
            job(task);
        }
    }

    fn member(&self, index: usize) {
        let (mut seen, mut spins) = (0, 0);
        while !self.stop.load(Relaxed) {
            let state = self.state.load(Relaxed);
            if operation(state) == seen || state & OPEN == 0 {
                spins += 1;
                if spins < SPINS {
                    hint::spin_loop();
                } else {
                    self.sleep(index, seen);
                    spins = 0;
                }
                continue;
            }
            if self.state.compare_exchange_weak(state, state + 1, Acquire, Relaxed).is_err() {
                continue;
            }
            (seen, spins) = (operation(state), 0);
            // SAFETY: joined while open, so `job` is this operation's; it stays until nobody is at work.
            if let Some(job) = unsafe { *self.job.get() } {
                // SAFETY: `Team::run` does not return, so the closure lives, while a member is at work.
                let job = unsafe { &*job };
                if catch_unwind(AssertUnwindSafe(|| self.work(job))).is_err() {
                    self.panicked.store(true, Relaxed);
                }
            }
            self.state.fetch_sub(1, Release);
        }
    }

    /// Until the leader opens an operation that is not `seen`, or earlier.
    fn sleep(&self, index: usize, seen: u64) {
        self.asleep[index].store(true, SeqCst);
        let state = self.state.load(SeqCst);
        if (operation(state) == seen || state & OPEN == 0) && !self.stop.load(SeqCst) {
            thread::park();
        }
        self.asleep[index].store(false, SeqCst);
    }
}

/// `threads − 1` members and whoever calls [`Team::run`].
pub struct Team {
    shared: Arc<Shared>,
    members: Vec<(JoinHandle<()>, Thread)>,
}

impl Team {
    pub fn new(threads: usize) -> Team {
        let count = threads.max(1) - 1;
        let shared = Arc::new(Shared {
            state: AtomicU64::new(0),
            next: AtomicUsize::new(0),
            tasks: AtomicUsize::new(0),
            job: UnsafeCell::new(None),
            panicked: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            asleep: (0..count).map(|_| AtomicBool::new(false)).collect(),
        });
        let members = (0..count)
            .map(|index| {
                let shared = shared.clone();
                let builder = thread::Builder::new().name(format!("c2c-cpu-{}", index + 1));
                let handle =
                    builder.spawn(move || shared.member(index)).expect("the system can start a thread");
                let thread = handle.thread().clone();
                (handle, thread)
            })
            .collect();
        Team { shared, members }
    }

    pub fn threads(&self) -> usize {
        self.members.len() + 1
    }

    /// Runs `job(0)`, …, `job(tasks − 1)`, each once, on all threads; returns when all are done.
    ///
    /// Takes `&mut self`: one job at a time. Tasks are handed out in order, so sort long ones first.
    ///
    /// # Panics
    /// If a task does.
    pub fn run(&mut self, tasks: usize, job: &(dyn Fn(usize) + Sync)) {
        if self.members.is_empty() || tasks <= 1 {
            (0..tasks).for_each(job);
            return;
        }
        let shared = &*self.shared;
        shared.next.store(0, Relaxed);
        shared.tasks.store(tasks, Relaxed);
        // SAFETY: only the lifetime is erased; this function waits for every member before it returns or unwinds.
        let erased: Job = unsafe { std::mem::transmute::<*const (dyn Fn(usize) + Sync + '_), Job>(job) };
        // SAFETY: no member is at work or can join (`&mut self`, and the end of the last run), so nobody reads `job`.
        unsafe { *shared.job.get() = Some(erased) };
        let number = operation(shared.state.load(Relaxed)).wrapping_add(1) & u64::from(u32::MAX);
        shared.state.store(number << 32 | OPEN, SeqCst);
        for ((_, thread), asleep) in self.members.iter().zip(&shared.asleep) {
            if asleep.load(SeqCst) {
                thread.unpark();
            }
        }
        let mine = catch_unwind(AssertUnwindSafe(|| shared.work(job)));
        if mine.is_err() {
            // Nobody shall begin what is left.
            shared.next.store(tasks, Relaxed);
        }
        shared.state.fetch_and(!OPEN, Relaxed);
        let mut spins = 0u32;
        while at_work(shared.state.load(Acquire)) != 0 {
            spins += 1;
            // On an overloaded machine the member may not even have a core: give it ours.
            if spins.is_multiple_of(PATIENCE) { thread::yield_now() } else { hint::spin_loop() }
        }
        if let Err(panic) = mine {
            std::panic::resume_unwind(panic);
        }
        assert!(
            !shared.panicked.swap(false, Relaxed),
            "a task of a CPU operation panicked on another thread"
        );
    }

    /// Splits `data` into chunks of `chunk` elements and runs `job(index, chunk)` on each.
    pub fn chunks_mut<T: Send>(
        &mut self,
        data: &mut [T],
        chunk: usize,
        job: impl Fn(usize, &mut [T]) + Sync,
    ) {
        let len = data.len();
        let base = SendPtr(data.as_mut_ptr());
        self.run(len.div_ceil(chunk.max(1)), &|index| {
            let start = index * chunk;
            // SAFETY: tasks have distinct indices, so the chunks are disjoint parts of `data`, which is borrowed
            // mutably for the whole run.
            let part =
                unsafe { std::slice::from_raw_parts_mut(base.get().add(start), chunk.min(len - start)) };
            job(index, part);
        });
    }
}

impl Drop for Team {
    fn drop(&mut self) {
        self.shared.stop.store(true, SeqCst);
        for (handle, thread) in self.members.drain(..) {
            thread.unpark();
            if handle.join().is_err() {
                log::error!("a CPU thread ended by panic");
            }
        }
    }
}

/// A pointer that tasks of one operation share, each writing its own part.
pub(super) struct SendPtr<T>(pub *mut T);

impl<T> Clone for SendPtr<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for SendPtr<T> {}

impl<T> SendPtr<T> {
    pub(super) fn get(self) -> *mut T {
        self.0
    }
}

// SAFETY: the users write disjoint parts, see each use.
unsafe impl<T: Send> Send for SendPtr<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for SendPtr<T> {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once() {
        for threads in [1, 2, 3] {
            let mut team = Team::new(threads);
            for tasks in [0, 1, 2, 7, 100] {
                let counts: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                team.run(tasks, &|task| {
                    counts[task].fetch_add(1, SeqCst);
                });
                assert!(
                    counts.iter().all(|count| count.load(SeqCst) == 1),
                    "{threads} threads, {tasks} tasks"
                );
            }
        }
    }

    #[test]
    fn sleeping_members_wake_up() {
        let mut team = Team::new(2);
        for _ in 0..3 {
            thread::sleep(std::time::Duration::from_millis(20));
            let mut data = vec![0; 1000];
            team.chunks_mut(&mut data, 7, |index, part| part.fill(index + 1));
            assert!(data.iter().enumerate().all(|(i, &v)| v == i / 7 + 1));
        }
    }

    #[test]
    fn a_panicking_task_is_not_lost_and_the_team_survives() {
        let mut team = Team::new(2);
        let outcome = catch_unwind(AssertUnwindSafe(|| team.run(64, &|task| assert_ne!(task, 63))));
        assert!(outcome.is_err());
        let done = AtomicUsize::new(0);
        team.run(10, &|_| {
            done.fetch_add(1, SeqCst);
        });
        assert_eq!(done.load(SeqCst), 10);
    }
}
