//! Runs small PTX programs on memory of their own, without the driver.
#![allow(dead_code)] // Each test file uses a part.

use std::collections::BTreeMap;

use softcuda::counters::Counts;
use softcuda::exec::{Fault, Launch, launch};
use softcuda::memory::{DeviceMemory, Op};
use softcuda::ptx::{self, Module};

/// What every text begins with.
pub const HEAD: &str = ".version 8.0\n.target sm_80\n.address_size 64\n";

/// Instructions a block may run.
const BUDGET: u64 = 1 << 24;

/// A device whose operations come one after another.
#[derive(Default)]
pub struct Card {
    pub memory: DeviceMemory,
    pub ops: u32,
    /// In which order warps take their turns.
    pub seed: u64,
}

impl Card {
    pub fn op<T>(&mut self, name: &str, call: impl FnOnce(&mut DeviceMemory, &Op) -> T) -> T {
        let op = Op { id: self.ops, happens_before: &|_| true, name };
        self.ops += 1;
        call(&mut self.memory, &op)
    }

    /// New memory that holds the bytes.
    pub fn put(&mut self, bytes: &[u8]) -> u64 {
        let address = self.room(bytes.len());
        self.op("upload", |memory, op| memory.write(address, bytes, op)).unwrap();
        address
    }

    /// New memory that nothing was written to.
    pub fn room(&mut self, bytes: usize) -> u64 {
        self.memory.alloc(bytes as u64)
    }

    pub fn get(&mut self, address: u64, bytes: usize) -> Vec<u8> {
        let mut data = vec![0; bytes];
        self.op("download", |memory, op| memory.read(address, &mut data, op)).unwrap();
        data
    }

    pub fn words(&mut self, address: u64, count: usize) -> Vec<u32> {
        let bytes = self.get(address, 4 * count);
        bytes.chunks(4).map(|word| u32::from_le_bytes(word.try_into().unwrap())).collect()
    }

    /// The module's variables in memory, by name: address and bytes.
    pub fn place(&mut self, module: &Module) -> BTreeMap<String, (u64, u64)> {
        let mut placed = BTreeMap::new();
        for variable in &module.variables {
            let mut bytes = variable.initial.clone();
            bytes.resize(variable.bytes as usize, 0);
            placed.insert(variable.name.clone(), (self.put(&bytes), variable.bytes));
        }
        placed
    }

    pub fn launch(&mut self, module: &Module, call: &Call) -> Result<Counts, Fault> {
        let globals = self.place(module);
        self.launch_with(module, call, &globals)
    }

    pub fn launch_with(
        &mut self,
        module: &Module,
        call: &Call,
        globals: &BTreeMap<String, (u64, u64)>,
    ) -> Result<Counts, Fault> {
        let params: Vec<u8> = call.params.iter().flat_map(|param| param.to_le_bytes()).collect();
        let launched = Launch {
            module,
            kernel: call.kernel,
            grid: [call.grid, 1, 1],
            block: [call.block, 1, 1],
            dynamic_shared: call.shared,
            params: &params,
            globals,
            seed: self.seed,
            budget: BUDGET,
        };
        self.op(call.kernel, |memory, op| launch(&launched, memory, op))
    }

    /// One thread, with parameters as they lie in memory.
    pub fn launch_packed(&mut self, module: &Module, kernel: &str, params: Vec<u8>) -> Result<Counts, Fault> {
        self.launch_shaped(module, kernel, [1; 3], [1; 3], params)
    }

    pub fn launch_shaped(
        &mut self,
        module: &Module,
        kernel: &str,
        grid: [u32; 3],
        block: [u32; 3],
        params: Vec<u8>,
    ) -> Result<Counts, Fault> {
        let globals = self.place(module);
        let (params, globals) = (&params[..], &globals);
        let launched = Launch {
            module,
            kernel,
            globals,
            grid,
            block,
            dynamic_shared: 0,
            params,
            seed: self.seed,
            budget: BUDGET,
        };
        self.op(kernel, |memory, op| launch(&launched, memory, op))
    }
}

/// A launch whose parameters all have 64 bits.
pub struct Call<'a> {
    pub kernel: &'a str,
    pub grid: u32,
    pub block: u32,
    pub shared: u32,
    pub params: Vec<u64>,
}

pub fn call<'a>(kernel: &'a str, grid: u32, block: u32, params: &[u64]) -> Call<'a> {
    Call { kernel, grid, block, shared: 0, params: params.to_vec() }
}

pub fn parse(body: &str) -> Module {
    let text = format!("{HEAD}{body}");
    ptx::parse(&text).unwrap_or_else(|error| panic!("{error}\n{text}"))
}

/// The type of the registers an instruction reads or writes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Ty {
    B16,
    B32,
    B64,
    F32,
    F64,
}

use Ty::*;

impl Ty {
    fn name(self) -> &'static str {
        match self {
            B16 => "b16",
            B32 => "b32",
            B64 => "b64",
            F32 => "f32",
            F64 => "f64",
        }
    }

    fn mask(self) -> u64 {
        match self {
            B16 => 0xffff,
            B32 | F32 => 0xffff_ffff,
            B64 | F64 => u64::MAX,
        }
    }
}

/// What `body`, which makes `%d` of `%a`, `%b`, `%c` (all of these may be predicates' sources too: `%p`,
/// `%q` are there), gives for each row of operands: one thread a row.
pub fn eval(body: &str, d: Ty, abc: [Ty; 3], rows: &[[u64; 3]]) -> Vec<u64> {
    let [a, b, c] = abc.map(Ty::name);
    let text = format!(
        ".visible .entry k(.param .u64 in, .param .u64 out, .param .u64 count) {{
  .reg .{d} %d, %e;\n  .reg .{a} %a;\n  .reg .{b} %b;\n  .reg .{c} %c;
  .reg .pred %p, %q, %out;\n  .reg .b32 %i, %n, %j, %k;\n  .reg .b64 %x, %y, %z, %w;\n  .reg .b16 %h, %g;
  mov.u32 %i, %tid.x;
  ld.param.u32 %n, [count];
  setp.ge.u32 %out, %i, %n;
  @%out bra DONE;
  ld.param.u64 %x, [in];
  ld.param.u64 %y, [out];
  mad.wide.u32 %x, %i, 24, %x;
  mad.wide.u32 %y, %i, 8, %y;
  ld.global.{a} %a, [%x];
  ld.global.{b} %b, [%x+8];
  ld.global.{c} %c, [%x+16];
  {body}
  st.global.{d} [%y], %d;
DONE:
  ret;
}}\n",
        d = d.name(),
    );
    let module = parse(&text);
    let mut card = Card::default();
    let operands: Vec<u8> = rows.iter().flatten().flat_map(|value| value.to_le_bytes()).collect();
    let (input, output) = (card.put(&operands), card.put(&vec![0; 8 * rows.len()]));
    let block = rows.len().next_multiple_of(32) as u32;
    let launched = card.launch(&module, &call("k", 1, block, &[input, output, rows.len() as u64]));
    launched.unwrap_or_else(|fault| panic!("{fault}\n{text}"));
    let bytes = card.get(output, 8 * rows.len());
    bytes.chunks(8).map(|value| u64::from_le_bytes(value.try_into().unwrap()) & d.mask()).collect()
}

/// Checks `instruction %d, %a, …` against `[operands…, expected]`.
#[track_caller]
pub fn check<const N: usize>(instruction: &str, d: Ty, operand: Ty, rows: &[[u64; N]]) {
    check_mixed(instruction, d, [operand; 3], rows);
}

#[track_caller]
pub fn check_mixed<const N: usize>(instruction: &str, d: Ty, abc: [Ty; 3], rows: &[[u64; N]]) {
    let operands = ["%a", "%b", "%c"][..N - 1].join(", ");
    check_body(&format!("{instruction} %d, {operands};"), d, abc, rows);
}

#[track_caller]
pub fn check_body<const N: usize>(body: &str, d: Ty, abc: [Ty; 3], rows: &[[u64; N]]) {
    let operands: Vec<[u64; 3]> = rows
        .iter()
        .map(|row| {
            std::array::from_fn(|place| if place + 1 < N { row[place] & abc[place].mask() } else { 0 })
        })
        .collect();
    let found = eval(body, d, abc, &operands);
    for (row, found) in rows.iter().zip(found) {
        let expected = row[N - 1] & d.mask();
        assert!(
            found == expected,
            "{body} of {:x?} is {found:#x}, and should be {expected:#x}",
            &row[..N - 1]
        );
    }
}

pub fn f(value: f32) -> u64 {
    value.to_bits().into()
}

pub fn d(value: f64) -> u64 {
    value.to_bits()
}

/// A negative number's bits.
pub fn neg(value: i64) -> u64 {
    value as u64
}
