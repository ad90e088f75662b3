//! Stream capture, and the graphs it makes.
//!
//! A capture spreads from the stream it began in to every stream that waits for an event recorded in it, and
//! must be joined again before it ends (CUDA C++ programming guide, "Cross-stream Dependencies and Events").
//! A launch of the instantiated graph puts each branch on a lane of its own, so branches are scheduled, and
//! checked for races, like streams.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::thread::ThreadId;

use super::clock::{Clock, Mark, Stamp};
use super::inject::Kind;
use super::machine::{Machine, Recorded};
use super::status::{Outcome, Status};
use super::work::Work;

/// `CUstreamCaptureMode`: who may make calls that a capture cannot see.
pub const MODE_GLOBAL: u32 = 0;
pub const MODE_RELAXED: u32 = 2;

/// An operation of a graph, and the nodes it comes after (all of them earlier in the list).
#[derive(Clone)]
pub struct Node {
    pub work: Work,
    pub after: Vec<usize>,
}

pub struct Capture {
    pub context: u64,
    /// The stream in which it began.
    origin: u64,
    thread: ThreadId,
    mode: u32,
    nodes: Vec<Node>,
    /// For each stream in it, what its next node comes after.
    ends: BTreeMap<u64, Vec<usize>>,
    /// A call that a capture cannot hold was made: it can only be ended.
    pub broken: bool,
}

pub struct Graph {
    pub context: u64,
    pub nodes: Arc<Vec<Node>>,
}

/// An instantiated graph.
pub struct Exec {
    pub context: u64,
    nodes: Arc<Vec<Node>>,
    /// The lane of each node: a chain of nodes shares one.
    lanes: Vec<usize>,
    /// The end of its last launch: a graph never runs beside itself.
    end: Option<(Mark, Clock)>,
}

fn union(into: &mut Vec<usize>, more: &[usize]) {
    for &node in more {
        if !into.contains(&node) {
            into.push(node);
        }
    }
}

impl Capture {
    fn add(&mut self, stream: u64, work: Work) {
        let node = self.nodes.len();
        let after = self.ends.insert(stream, vec![node]).unwrap_or_default();
        self.nodes.push(Node { work, after });
    }

    /// The nodes that `ends` come after, and themselves.
    fn reached(&self, ends: &[usize]) -> Vec<bool> {
        let mut reached = vec![false; self.nodes.len()];
        for &end in ends {
            reached[end] = true;
        }
        for node in (0..self.nodes.len()).rev() {
            if reached[node] {
                for &before in &self.nodes[node].after {
                    reached[before] = true;
                }
            }
        }
        reached
    }
}

impl Machine {
    fn capture_of(&mut self, stream: u64) -> Option<&mut Capture> {
        let capture = self.streams.get(&stream)?.capture?;
        self.captures.get_mut(&capture)
    }

    /// Refuses a call on a capturing stream that a graph cannot hold; the capture is lost.
    pub fn break_capture<T>(&mut self, stream: u64, code: Status, message: &str) -> Outcome<T> {
        if let Some(capture) = self.capture_of(stream) {
            capture.broken = true;
        }
        self.refuse(code, message)
    }

    /// Refuses a call that waits on, or asks about, a stream that is capturing.
    pub fn not_capturing(&mut self, stream: u64) -> Outcome {
        match self.capture_of(stream) {
            None => Ok(()),
            Some(_) => self.break_capture(
                stream,
                Status::STREAM_CAPTURE_UNSUPPORTED,
                "a capturing stream cannot be waited for or asked",
            ),
        }
    }

    /// Refuses a call that a capture would not see and a graph would not repeat (allocation, waiting,
    /// loading), where a capture forbids it: one of this thread that is not relaxed, or a global one.
    pub fn no_capture_forbids(&mut self, call: &str) -> Outcome {
        let thread = std::thread::current().id();
        let forbids = |capture: &&mut Capture| {
            !capture.broken
                && (capture.mode == MODE_GLOBAL || capture.mode != MODE_RELAXED && capture.thread == thread)
        };
        let Some(capture) = self.captures.values_mut().find(|capture| forbids(capture)) else {
            return Ok(());
        };
        capture.broken = true;
        self.refuse(
            Status::STREAM_CAPTURE_UNSUPPORTED,
            format!("{call} while a stream captures in a mode that forbids it"),
        )
    }

    /// Adds the work to the capture that the stream is in. False: it is in none.
    pub fn captured(&mut self, stream: u64, work: &Work) -> Outcome<bool> {
        let Some(capture) = self.capture_of(stream) else {
            return Ok(false);
        };
        if capture.broken {
            return Err(Status::STREAM_CAPTURE_INVALIDATED);
        }
        if let Some(why) = work.not_for_graphs() {
            return self.break_capture(stream, Status::STREAM_CAPTURE_UNSUPPORTED, why);
        }
        capture.add(stream, work.clone());
        Ok(true)
    }

    pub fn begin_capture(&mut self, stream: u64, mode: u32) -> Outcome {
        self.inject(Kind::Capture)?;
        let serial = self.new_serial();
        let target = self.streams.get_mut(&stream).ok_or(Status::INVALID_HANDLE)?;
        if mode > MODE_RELAXED || target.capture.is_some() {
            return self
                .refuse(Status::INVALID_VALUE, "no such capture mode, or the stream captures already");
        }
        let context = target.context;
        if self.contexts.get(&context).is_some_and(|context| context.null == stream) {
            return self
                .refuse(Status::STREAM_CAPTURE_UNSUPPORTED, "the legacy default stream cannot be captured");
        }
        target.capture = Some(serial);
        let thread = std::thread::current().id();
        let ends = BTreeMap::from([(stream, Vec::new())]);
        let capture =
            Capture { context, origin: stream, thread, mode, nodes: Vec::new(), ends, broken: false };
        self.captures.insert(serial, capture);
        Ok(())
    }

    /// Ends the capture: the graph, unless the capture was lost or a fork was not joined.
    pub fn end_capture(&mut self, stream: u64) -> Outcome<u64> {
        let Some(serial) = self.streams.get(&stream).ok_or(Status::INVALID_HANDLE)?.capture else {
            return self.refuse(Status::ILLEGAL_STATE, "the stream does not capture");
        };
        let capture = &self.captures[&serial];
        if capture.origin != stream {
            return self.break_capture(
                stream,
                Status::STREAM_CAPTURE_UNMATCHED,
                "the capture began in another stream",
            );
        }
        if capture.mode != MODE_RELAXED && capture.thread != std::thread::current().id() {
            return self.refuse(
                Status::STREAM_CAPTURE_WRONG_THREAD,
                "the capture began in another thread and is not relaxed",
            );
        }
        let capture = self.captures.remove(&serial).expect("a capturing stream's capture exists");
        for stream in self.streams.values_mut().filter(|stream| stream.capture == Some(serial)) {
            stream.capture = None;
        }
        if capture.broken {
            return Err(Status::STREAM_CAPTURE_INVALIDATED);
        }
        let joined = capture.reached(&capture.ends[&stream]);
        let unjoined = capture.ends.values().flatten().find(|&&node| !joined[node]);
        if let Some(&node) = unjoined {
            let name = capture.nodes[node].work.name();
            return self.refuse(
                Status::STREAM_CAPTURE_UNJOINED,
                format!("{name} was captured in a stream that the first one never waited for"),
            );
        }
        self.inject(Kind::Capture)?;
        let graph = self.new_serial();
        let nodes = Arc::new(capture.nodes);
        self.graphs.insert(graph, Graph { context: capture.context, nodes });
        Ok(graph)
    }

    /// `CUstreamCaptureStatus` of the stream.
    pub fn capture_status(&mut self, stream: u64) -> u32 {
        self.capture_of(stream).map_or(0, |capture| if capture.broken { 2 } else { 1 })
    }

    /// What an event records in a capturing stream.
    pub fn record_captured(&mut self, stream: u64) -> Outcome<Option<Recorded>> {
        let Some(serial) = self.streams.get(&stream).ok_or(Status::INVALID_HANDLE)?.capture else {
            return Ok(None);
        };
        let capture = &self.captures[&serial];
        if capture.broken {
            return Err(Status::STREAM_CAPTURE_INVALIDATED);
        }
        let after = capture.ends[&stream].clone();
        Ok(Some(Recorded::Captured { capture: serial, after }))
    }

    /// `stream` waits for an event recorded in a capture: it joins that capture.
    pub fn wait_captured(&mut self, stream: u64, capture: u64, after: &[usize]) -> Outcome {
        let own = self.streams.get(&stream).ok_or(Status::INVALID_HANDLE)?.capture;
        if own.is_some_and(|own| own != capture) {
            return self.break_capture(
                stream,
                Status::STREAM_CAPTURE_MERGE,
                "the event belongs to another capture",
            );
        }
        let Some(captured) = self.captures.get_mut(&capture) else {
            return self
                .refuse(Status::CAPTURED_EVENT, "the event was last recorded in a capture that is over");
        };
        if captured.broken {
            return Err(Status::STREAM_CAPTURE_INVALIDATED);
        }
        union(captured.ends.entry(stream).or_default(), after);
        self.streams.get_mut(&stream).ok_or(Status::INVALID_HANDLE)?.capture = Some(capture);
        Ok(())
    }

    pub fn instantiate(&mut self, graph: u64) -> Outcome<u64> {
        self.inject(Kind::GraphInstantiate)?;
        let graph = self.graphs.get(&graph).ok_or(Status::INVALID_HANDLE)?;
        let (context, nodes) = (graph.context, graph.nodes.clone());
        // A node that comes after the last of a chain prolongs it; any other starts a chain.
        let mut lanes: Vec<usize> = Vec::new();
        let mut tails: BTreeMap<usize, usize> = BTreeMap::new();
        for (number, node) in nodes.iter().enumerate() {
            let before = node.after.iter().find(|&before| tails.get(&lanes[*before]) == Some(before));
            let lane = before.map(|&before| lanes[before]).unwrap_or_else(|| self.new_lane(context));
            lanes.push(lane);
            tails.insert(lane, number);
        }
        let serial = self.new_serial();
        self.execs.insert(serial, Exec { context, nodes, lanes, end: None });
        Ok(serial)
    }

    pub fn launch_graph(&mut self, exec: u64, stream: u64) -> Outcome {
        self.inject(Kind::GraphLaunch)?;
        if self.streams.get(&stream).is_some_and(|stream| stream.capture.is_some()) {
            return self.break_capture(
                stream,
                Status::STREAM_CAPTURE_UNSUPPORTED,
                "softcuda does not capture graph launches",
            );
        }
        let graph = self.execs.get(&exec).ok_or(Status::INVALID_HANDLE)?;
        let (nodes, lanes, last) = (graph.nodes.clone(), graph.lanes.clone(), graph.end.clone());
        let (needs, learned) = match last {
            Some((mark, past)) => (vec![mark], past),
            None => (Vec::new(), Clock::default()),
        };
        let begin = self.enqueue_after(stream, needs, &learned, Work::Nothing)?;
        let mut stamps: Vec<Stamp> = Vec::with_capacity(nodes.len());
        let mut is_end = vec![true; nodes.len()];
        for (node, &lane) in nodes.iter().zip(&lanes) {
            let mut needs = vec![begin.mark];
            let mut learned = begin.past();
            for &before in &node.after {
                is_end[before] = false;
                needs.push(stamps[before].mark);
                learned.merge(&stamps[before].past());
            }
            stamps.push(self.push(lane, needs, &learned, node.work.clone()));
        }
        let mut learned = Clock::default();
        let ends: Vec<&Stamp> = stamps.iter().zip(&is_end).filter(|end| *end.1).map(|end| end.0).collect();
        for end in &ends {
            learned.merge(&end.past());
        }
        let needs = ends.iter().map(|end| end.mark).collect();
        let end = self.enqueue_after(stream, needs, &learned, Work::Nothing)?;
        if let Some(exec) = self.execs.get_mut(&exec) {
            exec.end = Some((end.mark, end.past()));
        }
        Ok(())
    }
}
