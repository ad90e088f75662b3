//! `atom` and `red` (PTX ISA 9.0): lanes in order, each a read, an operation and a write.

use super::Problem;
use super::access::{aligned, resolve};
use super::fault::Access;
use super::warp::{Outcome, Runner, each};
use crate::arith::float::{F64, Mode, extreme, f64_of};
use crate::arith::integer::{mask, signed};
use crate::ptx::code::{Address, AtomicOp, LANES, Register, Source, Space};
use crate::ptx::decode::format_of;
use crate::ptx::types::Type;

impl Runner<'_, '_> {
    #[expect(clippy::too_many_arguments, reason = "the instruction has as many parts")]
    pub fn atomic(
        &mut self,
        space: Space,
        op: AtomicOp,
        ty: Type,
        d: Option<Register>,
        address: &Address,
        [b, c]: [Source; 2],
        lanes: u32,
    ) -> Outcome<()> {
        let addresses = self.addresses(address);
        let (b, c) = (*self.row(b), *self.row(c));
        let bytes = ty.bytes() as usize;
        let mut before = [0; LANES];
        for lane in each(lanes) {
            let at = |problem: Problem| (problem, lane);
            aligned(space, addresses[lane], bytes as u64, Access::Atomic).map_err(at)?;
            let mut data = [0; 8];
            self.peek(space, addresses[lane], lane, &mut data[..bytes]).map_err(at)?;
            let old = u64::from_le_bytes(data);
            before[lane] = old;
            if let (Space::Global, address) = resolve(space, addresses[lane]) {
                self.shared.handover.atomic(address, self.block);
            }
            let new = combine(op, ty, old, b[lane] & ty.mask(), c[lane] & ty.mask());
            self.put_bytes(space, addresses[lane], &new.to_le_bytes()[..bytes], lane, true).map_err(at)?;
        }
        if let Some(d) = d {
            self.warp.put(d, lanes, &before);
        }
        self.counts.atomics += 1;
        Ok(())
    }
}

fn combine(op: AtomicOp, ty: Type, old: u64, b: u64, c: u64) -> u64 {
    let larger = op == AtomicOp::Max;
    match op {
        AtomicOp::Add if ty.is_float() && ty.bits == 64 => (f64_of(old) + f64_of(b)).to_bits(),
        AtomicOp::Add if ty.is_float() => {
            let mode = Mode::of(format_of(ty));
            let add = |a, b| mode.sum(mode.input(a), mode.input(b));
            if ty.pair { add(old & 0xffff, b & 0xffff) | add(old >> 16, b >> 16) << 16 } else { add(old, b) }
        }
        AtomicOp::Add => old.wrapping_add(b) & ty.mask(),
        AtomicOp::Min | AtomicOp::Max if ty.is_float() => {
            let format = if ty.bits == 64 { F64 } else { format_of(ty) };
            let pick = |a, b| extreme(Mode::of(format), a, b, larger, false);
            if ty.pair {
                pick(old & 0xffff, b & 0xffff) | pick(old >> 16, b >> 16) << 16
            } else {
                pick(old, b)
            }
        }
        AtomicOp::Min | AtomicOp::Max if ty.is_signed() => {
            let (a, b) = (signed(old, ty.bits), signed(b, ty.bits));
            (if larger { a.max(b) } else { a.min(b) }) as u64 & mask(ty.bits)
        }
        AtomicOp::Min => old.min(b),
        AtomicOp::Max => old.max(b),
        AtomicOp::And => old & b,
        AtomicOp::Or => old | b,
        AtomicOp::Xor => old ^ b,
        AtomicOp::Exchange => b,
        AtomicOp::CompareAndSwap => {
            if old == b {
                c
            } else {
                old
            }
        }
        AtomicOp::Increment => {
            if old >= b {
                0
            } else {
                old + 1
            }
        }
        AtomicOp::Decrement => {
            if old == 0 || old > b {
                b
            } else {
                old - 1
            }
        }
    }
}
