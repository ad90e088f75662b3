//! Fewer registers: PTX names each value anew, so a large kernel has thousands, of which some hundred are
//! needed at once. Registers whose values are never needed together become one.

use super::code::{Code, Instruction, Op, Register, Source};

/// How an instruction touches a register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Touch {
    Read,
    Write,
}

/// Calls `each` with the registers of an instruction, predicates left out.
fn registers(op: &mut Op, each: &mut dyn FnMut(&mut Register, Touch)) {
    let read = |source: &mut Source, each: &mut dyn FnMut(&mut Register, Touch)| {
        if let Source::Register(register) = source {
            each(register, Touch::Read);
        }
    };
    match op {
        Op::Nothing | Op::CommitCopies | Op::WaitCopies(_) | Op::WaitAllCopies | Op::Fence => {}
        Op::Branch(_) | Op::Exit | Op::Trap(_) | Op::Print { .. } | Op::Assertion(_) | Op::Logic(..) => {}
        Op::Map1(_, d, a) => {
            read(a, each);
            each(d, Touch::Write);
        }
        Op::Map2(_, d, ab) => {
            ab.iter_mut().for_each(|a| read(a, each));
            each(d, Touch::Write);
        }
        Op::Map3(_, d, abc) => {
            abc.iter_mut().for_each(|a| read(a, each));
            each(d, Touch::Write);
        }
        Op::Map4(_, d, abcd) => {
            abcd.iter_mut().for_each(|a| read(a, each));
            each(d, Touch::Write);
        }
        Op::Compare { ab, .. } => ab.iter_mut().for_each(|a| read(a, each)),
        Op::Carry { d, ab, .. } => {
            ab.iter_mut().for_each(|a| read(a, each));
            each(d, Touch::Write);
        }
        Op::Select { d, a, b, .. } => {
            read(a, each);
            read(b, each);
            each(d, Touch::Write);
        }
        Op::Special(d, _) | Op::ActiveMask(d) => each(d, Touch::Write),
        Op::Pack { d, parts, .. } => {
            parts.iter_mut().for_each(|part| read(part, each));
            each(d, Touch::Write);
        }
        Op::Unpack { parts, a, .. } => {
            read(a, each);
            parts.iter_mut().flatten().for_each(|d| each(d, Touch::Write));
        }
        Op::Load { to, address, .. } => {
            read(&mut address.base, each);
            to.iter_mut().flatten().for_each(|(d, _)| each(d, Touch::Write));
        }
        Op::Store { from, address, .. } => {
            read(&mut address.base, each);
            from.iter_mut().for_each(|source| read(source, each));
        }
        Op::Atomic { d, address, b, c, .. } => {
            read(&mut address.base, each);
            read(b, each);
            read(c, each);
            d.iter_mut().for_each(|d| each(d, Touch::Write));
        }
        Op::CopyAsync { to, from, source_bytes, .. } => {
            read(&mut to.base, each);
            read(&mut from.base, each);
            source_bytes.iter_mut().for_each(|source| read(source, each));
        }
        Op::LoadMatrix { to, address, .. } => {
            read(&mut address.base, each);
            to.iter_mut().for_each(|d| each(d, Touch::Write));
        }
        Op::Mma(mma) => {
            let sources = mma.a.iter_mut().chain(&mut mma.b).chain(&mut mma.c);
            sources.for_each(|source| read(source, each));
            mma.d.iter_mut().for_each(|d| each(d, Touch::Write));
        }
        Op::Shuffle { d, a, b, c, members, .. } => {
            [a, b, c, members].into_iter().for_each(|source| read(source, each));
            each(d, Touch::Write);
        }
        Op::Vote { mode, d, members, .. } => {
            read(members, each);
            if *mode == super::code::VoteMode::Ballot {
                each(d, Touch::Write);
            }
        }
        Op::Match { d, a, members, .. } | Op::Reduce { d, a, members, .. } => {
            read(a, each);
            read(members, each);
            each(d, Touch::Write);
        }
        Op::Barrier { id, threads, reduce, .. } => {
            read(id, each);
            threads.iter_mut().for_each(|threads| read(threads, each));
            if let Some((super::code::BarrierReduction::Count(d), _)) = reduce {
                each(d, Touch::Write);
            }
        }
        Op::WarpBarrier { members } => read(members, each),
        Op::BranchIndex { a, .. } => read(a, each),
    }
}

/// Instructions without a jump in or out, but at the ends.
struct Stretch {
    from: usize,
    to: usize,
    next: Vec<usize>,
    /// Read before they are written, and written whatever the lane: bits.
    reads: Vec<u64>,
    writes: Vec<u64>,
    needed: Vec<u64>,
}

/// Where control can go from an instruction, beside the next one; and whether to the next one.
fn jumps(instruction: &Instruction) -> (Vec<u32>, bool) {
    let guarded = instruction.guard.is_some();
    match &instruction.op {
        Op::Branch(target) => (vec![*target], guarded),
        Op::BranchIndex { targets, .. } => (targets.clone(), guarded),
        Op::Exit => (Vec::new(), guarded),
        _ => (Vec::new(), true),
    }
}

fn stretches(code: &mut Code) -> Vec<Stretch> {
    let count = code.instructions.len();
    let mut starts = vec![false; count + 1];
    starts[0] = true;
    for (at, instruction) in code.instructions.iter().enumerate() {
        let (targets, falls) = jumps(instruction);
        if !targets.is_empty() || !falls || matches!(instruction.op, Op::Exit) {
            starts[at + 1] = true;
        }
        targets.iter().for_each(|&target| starts[target as usize] = true);
    }
    let firsts: Vec<usize> = (0..count).filter(|&at| starts[at]).collect();
    let mut number = vec![0; count];
    for (index, &first) in firsts.iter().enumerate() {
        number[first] = index;
    }
    let words = (code.registers as usize).div_ceil(64);
    let mut found = Vec::new();
    for (index, &from) in firsts.iter().enumerate() {
        let to = firsts.get(index + 1).copied().unwrap_or(count);
        let (targets, falls) = jumps(&code.instructions[to - 1]);
        let mut next: Vec<usize> = targets.iter().map(|&target| number[target as usize]).collect();
        if falls && to < count {
            next.push(index + 1);
        }
        let (mut reads, mut writes) = (vec![0; words], vec![0; words]);
        for instruction in &mut code.instructions[from..to] {
            let guarded = instruction.guard.is_some();
            registers(&mut instruction.op, &mut |register, touch| {
                let (word, bit) = (*register as usize / 64, 1 << (*register % 64));
                match touch {
                    Touch::Read if writes[word] & bit == 0 => reads[word] |= bit,
                    Touch::Write if !guarded => writes[word] |= bit,
                    _ => {}
                }
            });
        }
        found.push(Stretch { from, to, next, needed: reads.clone(), reads, writes });
    }
    found
}

/// Gives registers new numbers, the same to those that are never needed together.
pub fn allocate(code: &mut Code) {
    if code.instructions.is_empty() || code.registers == 0 {
        return;
    }
    let mut stretches = stretches(code);
    // What a stretch needs at its start: what it reads first, and what those after it need and it does not write.
    loop {
        let mut changed = false;
        for index in (0..stretches.len()).rev() {
            for next in stretches[index].next.clone() {
                for word in 0..stretches[index].reads.len() {
                    let passed = stretches[next].needed[word] & !stretches[index].writes[word];
                    let needed = &mut stretches[index].needed[word];
                    changed |= passed & !*needed != 0;
                    *needed |= passed;
                }
            }
        }
        if !changed {
            break;
        }
    }
    // From the first to the last instruction at which each is needed.
    let mut spans: Vec<Option<(usize, usize)>> = vec![None; code.registers as usize];
    let mut cover = |register: usize, at: usize| {
        let span = spans[register].get_or_insert((at, at));
        *span = (span.0.min(at), span.1.max(at));
    };
    for stretch in &stretches {
        for (word, &bits) in stretch.needed.iter().enumerate() {
            bits_of(bits).for_each(|bit| cover(word * 64 + bit, stretch.from));
        }
        for &next in &stretch.next {
            for (word, &bits) in stretches[next].needed.iter().enumerate() {
                bits_of(bits).for_each(|bit| cover(word * 64 + bit, stretch.to - 1));
            }
        }
        for at in stretch.from..stretch.to {
            registers(&mut code.instructions[at].op, &mut |register, _| cover(*register as usize, at));
        }
    }
    let mut order: Vec<usize> = (0..spans.len()).filter(|&register| spans[register].is_some()).collect();
    order.sort_by_key(|&register| spans[register]);
    let mut numbers = vec![0; spans.len()];
    let mut busy: std::collections::BTreeSet<(usize, Register)> = Default::default();
    let mut free = std::collections::BinaryHeap::new();
    let mut count = 0;
    for register in order {
        let Some((from, to)) = spans[register] else { continue };
        while let Some(&(end, number)) = busy.first()
            && end < from
        {
            busy.pop_first();
            free.push(std::cmp::Reverse(number));
        }
        let number = match free.pop() {
            Some(std::cmp::Reverse(number)) => number,
            None => {
                count += 1;
                count - 1
            }
        };
        busy.insert((to, number));
        numbers[register] = number;
    }
    for instruction in &mut code.instructions {
        registers(&mut instruction.op, &mut |register, _| *register = numbers[*register as usize]);
    }
    code.registers = count;
}

fn bits_of(mut bits: u64) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        (bits != 0).then(|| {
            let bit = bits.trailing_zeros() as usize;
            bits &= bits - 1;
            bit
        })
    })
}
