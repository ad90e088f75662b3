//! A device without a driver: one kernel after the other, for tests of kernels.

use std::collections::BTreeMap;

use crate::counters::Counts;
use crate::exec::{BUDGET, Fault, Launch, launch, place_variables};
use crate::memory::{DeviceMemory, Op};
use crate::ptx::Module;

/// How a kernel is launched.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    pub grid: [u32; 3],
    pub block: [u32; 3],
    /// Dynamic shared memory, bytes.
    pub shared: u32,
}

impl Shape {
    /// Blocks and threads along x.
    pub fn line(blocks: u32, threads: u32) -> Shape {
        Shape { grid: [blocks, 1, 1], block: [threads, 1, 1], shared: 0 }
    }
}

/// Every operation is ordered after the one before it.
#[derive(Default)]
pub struct Harness {
    pub memory: DeviceMemory,
    /// Decides the order of warps.
    pub seed: u64,
    operations: u32,
}

/// A module whose variables are in a harness's memory.
pub struct Loaded {
    pub module: Module,
    /// Name → (address, bytes).
    pub variables: BTreeMap<String, (u64, u64)>,
}

impl Harness {
    pub fn new() -> Harness {
        Harness::default()
    }

    fn op<'a>(&mut self, name: &'a str) -> Op<'a> {
        self.operations += 1;
        Op { id: self.operations, happens_before: &|_| true, name }
    }

    /// Memory that nobody wrote yet, bytes.
    pub fn alloc(&mut self, bytes: usize) -> u64 {
        self.memory.alloc(bytes as u64)
    }

    /// New memory with these bytes.
    ///
    /// # Panics
    /// Never: the memory is as large as the data.
    pub fn upload(&mut self, data: &[u8]) -> u64 {
        let address = self.alloc(data.len());
        let op = self.op("upload");
        self.memory.write(address, data, &op).expect("the allocation holds the data");
        address
    }

    /// # Errors
    /// Bytes outside an allocation, or that nobody wrote.
    pub fn download(&mut self, address: u64, bytes: usize) -> Result<Vec<u8>, Fault> {
        let mut data = vec![0; bytes];
        let op = self.op("download");
        self.memory.read(address, &mut data, &op)?;
        Ok(data)
    }

    /// # Errors
    /// An address that is no allocation's first.
    pub fn free(&mut self, address: u64) -> Result<(), Fault> {
        let op = self.op("free");
        self.memory.free(address, &op)
    }

    /// # Errors
    /// An initial address of a variable that the module lacks.
    pub fn load(&mut self, module: Module) -> Result<Loaded, Fault> {
        let op = self.op("load module");
        let variables = place_variables(&module, &mut self.memory, &op)?;
        Ok(Loaded { module, variables })
    }

    /// `params`: the arguments as the kernel lays them out.
    ///
    /// # Errors
    /// The first thing that is wrong with the launch or the kernel.
    pub fn launch(
        &mut self,
        loaded: &Loaded,
        kernel: &str,
        shape: Shape,
        params: &[u8],
    ) -> Result<Counts, Fault> {
        let op = self.op(kernel);
        let launched = Launch {
            module: &loaded.module,
            kernel,
            globals: &loaded.variables,
            grid: shape.grid,
            block: shape.block,
            dynamic_shared: shape.shared,
            params,
            seed: self.seed,
            budget: BUDGET,
        };
        launch(&launched, &mut self.memory, &op)
    }
}

/// Packs kernel parameters, each at a multiple of its size.
#[derive(Default)]
pub struct Params(Vec<u8>);

impl Params {
    pub fn new() -> Params {
        Params::default()
    }

    fn push(mut self, bytes: &[u8]) -> Params {
        self.0.resize(self.0.len().next_multiple_of(bytes.len()), 0);
        self.0.extend_from_slice(bytes);
        self
    }

    pub fn u64(self, value: u64) -> Params {
        self.push(&value.to_le_bytes())
    }

    pub fn u32(self, value: u32) -> Params {
        self.push(&value.to_le_bytes())
    }

    pub fn f32(self, value: f32) -> Params {
        self.push(&value.to_le_bytes())
    }

    /// Fills up to a multiple of `bytes`, as a struct ends.
    pub fn align(mut self, bytes: usize) -> Params {
        self.0.resize(self.0.len().next_multiple_of(bytes), 0);
        self
    }

    pub fn bytes(&self) -> &[u8] {
        &self.0
    }
}
