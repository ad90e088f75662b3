//! Graphs: instantiated, launched, thrown away. They are made by stream capture only.

use std::ffi::c_void;

use crate::driver::handle::{Handle, Kind};
use crate::driver::status::{Outcome, Status};
use crate::driver::{Entered, answer, enter_object, enter_stream_to_work, put};

fn enter_graph(graph: Handle) -> Outcome<(Entered, u64)> {
    enter_object(graph, Kind::Graph, |machine, serial| machine.graphs.get(&serial).map(|graph| graph.context))
}

fn enter_exec(exec: Handle) -> Outcome<(Entered, u64)> {
    enter_object(exec, Kind::GraphExec, |machine, serial| machine.execs.get(&serial).map(|exec| exec.context))
}

/// `AUTO_FREE_ON_LAUNCH` | `UPLOAD` | `USE_NODE_PRIORITY`: what changes nothing here.
const HARMLESS_FLAGS: u64 = 1 | 2 | 8;

/// # Safety
/// `exec` may be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGraphInstantiateWithFlags(exec: *mut Handle, graph: Handle, flags: u64) -> Status {
    answer(|| {
        let (mut entered, serial) = enter_graph(graph)?;
        entered.healthy()?;
        if flags & !HARMLESS_FLAGS != 0 {
            return entered.machine.refuse(Status::INVALID_VALUE, "launches from the device are not there");
        }
        let made = entered.machine.instantiate(serial)?;
        // SAFETY: forwarded.
        unsafe { put(exec, entered.handle(Kind::GraphExec, made)) }
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuGraphLaunch(exec: Handle, stream: Handle) -> Status {
    answer(|| {
        let (mut entered, stream) = enter_stream_to_work(stream)?;
        let (ordinal, serial) = exec.open(Kind::GraphExec).ok_or(Status::INVALID_HANDLE)?;
        if ordinal != entered.device.ordinal {
            return Err(Status::INVALID_HANDLE);
        }
        entered.machine.launch_graph(serial, stream)?;
        entered.machine.progress();
        Ok(())
    })
}

/// There is nothing to send ahead.
#[unsafe(no_mangle)]
pub extern "C" fn cuGraphUpload(exec: Handle, stream: Handle) -> Status {
    answer(|| {
        drop(enter_exec(exec)?);
        enter_stream_to_work(stream).map(drop)
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuGraphDestroy(graph: Handle) -> Status {
    answer(|| {
        let (mut entered, serial) = enter_graph(graph)?;
        entered.machine.graphs.remove(&serial);
        entered.healthy()
    })
}

/// A launch under way is not disturbed.
#[unsafe(no_mangle)]
pub extern "C" fn cuGraphExecDestroy(exec: Handle) -> Status {
    answer(|| {
        let (mut entered, serial) = enter_exec(exec)?;
        entered.machine.execs.remove(&serial);
        entered.healthy()
    })
}

/// How many nodes the graph has; the nodes themselves have no handles here.
///
/// # Safety
/// `count` may be written; `nodes` must be null.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGraphGetNodes(graph: Handle, nodes: *mut c_void, count: *mut usize) -> Status {
    answer(|| {
        let (entered, serial) = enter_graph(graph)?;
        if !nodes.is_null() {
            return Err(Status::NOT_SUPPORTED);
        }
        // SAFETY: forwarded.
        unsafe { put(count, entered.machine.graphs[&serial].nodes.len()) }
    })
}
