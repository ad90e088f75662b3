//! Runs kernels: blocks one after the other, the warps of a block in turns, 32 lanes in lock step.

mod access;
mod atomic;
mod block;
mod fault;
mod host;
mod lanes;
mod matrix;
mod warp;

use std::collections::BTreeMap;

pub use fault::{Access, Fault, Place, Problem};

use crate::counters::Counts;
use crate::memory::shadow::Order;
use crate::memory::{DeviceMemory, Op};
use crate::ptx::code::{Row, Symbol};
use crate::ptx::{Kernel, Module};

/// Everything a launch is given.
pub struct Launch<'a> {
    pub module: &'a Module,
    pub kernel: &'a str,
    /// Where the module's variables lie: name → (address, bytes).
    pub globals: &'a BTreeMap<String, (u64, u64)>,
    pub grid: [u32; 3],
    pub block: [u32; 3],
    /// Bytes.
    pub dynamic_shared: u32,
    /// The parameters, packed as [`Kernel::params`] says.
    pub params: &'a [u8],
    /// Decides in which order the warps of a block take their turns.
    pub seed: u64,
    /// Warp instructions a block may run before it counts as one that never ends.
    pub budget: u64,
}

/// More than any block of a test runs: some minutes.
pub const BUDGET: u64 = 1 << 30;

/// Dynamic shared memory begins at a multiple of this, bytes.
const SHARED_ALIGN: u32 = 16;

/// What all blocks of a launch share.
struct Grid<'a> {
    launch: &'a Launch<'a>,
    kernel: &'a Kernel,
    /// Rows of the addresses of symbols.
    symbols: Vec<Row>,
    shared_bytes: u32,
    op: &'a Op<'a>,
    order: Order<'a>,
}

impl Grid<'_> {
    fn fault(&self, problem: Problem, at: Option<(usize, u32, u32)>) -> Fault {
        let place = at.map(|(instruction, block, thread)| {
            let instruction =
                &self.kernel.code.instructions[instruction.min(self.kernel.code.instructions.len() - 1)];
            let (file, line) = instruction.source;
            let source = self.launch.module.files.get(&file).map(|file| (file.clone(), line));
            Box::new(Place {
                kernel: self.kernel.name.clone(),
                block: split(block, self.launch.grid),
                thread: split(thread, self.launch.block),
                ptx_line: instruction.line,
                source,
            })
        });
        Fault { problem, operation: self.op.name.to_owned(), place }
    }
}

/// The coordinates of a number within a box, x fastest.
fn split(number: u32, [x, y, _]: [u32; 3]) -> [u32; 3] {
    [number % x, number / x % y, number / x / y]
}

/// Runs the kernel to its end.
///
/// # Errors
/// The first thing that is wrong: in the launch itself, or in what a thread does.
pub fn launch(launch: &Launch, memory: &mut DeviceMemory, op: &Op) -> Result<Counts, Fault> {
    memory.note(op);
    let refuse = |what: String| Fault {
        problem: Problem::Launch { what },
        operation: op.name.to_owned(),
        place: None,
    };
    let Some(kernel) = launch.module.kernel(launch.kernel) else {
        return Err(refuse(format!("the module has no kernel {}", launch.kernel)));
    };
    if launch.params.len() != kernel.param_bytes as usize {
        let (given, wanted) = (launch.params.len(), kernel.param_bytes);
        return Err(refuse(format!("{given} bytes of parameters given, the kernel takes {wanted}")));
    }
    let threads: u64 = launch.block.iter().map(|&n| u64::from(n)).product();
    let blocks: u64 = launch.grid.iter().map(|&n| u64::from(n)).product();
    if !(1..=1024).contains(&threads) || blocks == 0 || blocks > u64::from(u32::MAX / 2) {
        return Err(refuse(format!("grid {:?} of blocks {:?}", launch.grid, launch.block)));
    }
    let dynamic = kernel.shared_bytes.next_multiple_of(SHARED_ALIGN);
    let mut symbols = Vec::new();
    for symbol in &kernel.code.symbols {
        let address = match symbol {
            Symbol::DynamicShared => dynamic.into(),
            Symbol::Variable(name) => match launch.globals.get(name) {
                Some(&(address, _)) => address,
                None => return Err(refuse(format!("variable {name} has no place"))),
            },
        };
        symbols.push([address; 32]);
    }
    let shared_bytes =
        if launch.dynamic_shared == 0 { kernel.shared_bytes } else { dynamic + launch.dynamic_shared };
    let grid = Grid { launch, kernel, symbols, shared_bytes, op, order: Order::new(op) };
    let mut counts = Counts::default();
    let mut state = block::State::new(&grid);
    for number in 0..blocks as u32 {
        block::run(&grid, &mut state, number, memory, &mut counts)?;
    }
    Ok(counts)
}

/// Puts a module's variables into memory: name → (address, bytes).
///
/// # Errors
/// An initial address of a variable that the module lacks.
pub fn place_variables(
    module: &Module,
    memory: &mut DeviceMemory,
    op: &Op,
) -> Result<BTreeMap<String, (u64, u64)>, Fault> {
    let mut placed = BTreeMap::new();
    for variable in &module.variables {
        placed.insert(variable.name.clone(), (memory.alloc(variable.bytes), variable.bytes));
    }
    for variable in &module.variables {
        let mut bytes = variable.initial.clone();
        bytes.resize(variable.bytes as usize, 0);
        for (at, name, offset) in &variable.addresses {
            let Some((address, _)) = placed.get(name) else {
                let problem =
                    Problem::Launch { what: format!("{} needs the address of {name}", variable.name) };
                return Err(Fault { problem, operation: op.name.to_owned(), place: None });
            };
            let value = address.wrapping_add(*offset as u64);
            bytes[*at as usize..][..8].copy_from_slice(&value.to_le_bytes());
        }
        memory.write(placed[&variable.name].0, &bytes, op)?;
    }
    Ok(placed)
}
