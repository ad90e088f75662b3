//! A kernel as the interpreter runs it: names resolved, arithmetic bound to functions of whole warps.

use std::sync::Arc;

use super::types::Type;
use crate::arith::float::Format;

pub const LANES: usize = 32;

/// One register of all lanes of a warp; narrower values are zero-extended.
pub type Row = [u64; LANES];

pub type Map1 = Arc<dyn Fn(&Row) -> Row + Send + Sync>;
pub type Map2 = Arc<dyn Fn(&Row, &Row) -> Row + Send + Sync>;
pub type Map3 = Arc<dyn Fn(&Row, &Row, &Row) -> Row + Send + Sync>;
pub type Map4 = Arc<dyn Fn(&Row, &Row, &Row, &Row) -> Row + Send + Sync>;
/// The lanes for which a comparison holds.
pub type Test = Arc<dyn Fn(&Row, &Row) -> u32 + Send + Sync>;

pub type Register = u32;

/// What an operand is read from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    Register(Register),
    /// Of [`Code::constants`].
    Constant(u32),
    /// The address of [`Code::symbols`]' entry, known at the launch.
    Symbol(u32),
}

/// A predicate register, or its negation. Register 0 is always false.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Predicate {
    pub register: Register,
    pub negated: bool,
}

pub const FALSE: Predicate = Predicate { register: 0, negated: false };

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Space {
    Generic,
    Global,
    Const,
    Shared,
    Local,
    /// A kernel's parameters, or those of an inlined call (which lie in local memory).
    Param,
}

#[derive(Clone, Copy, Debug)]
pub struct Address {
    pub base: Source,
    pub offset: i64,
    /// The base has 32 bits, and so has the sum.
    pub narrow: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Logic {
    And,
    Or,
    Xor,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Special {
    Tid(usize),
    Ntid(usize),
    Ctaid(usize),
    Nctaid(usize),
    Lane,
    Warp,
    Warps,
    /// `%lanemask_eq`, `lt`, `le`, `gt`, `ge`: lanes in that relation to this one.
    LanesEqual,
    LanesBelow,
    LanesUpTo,
    LanesAbove,
    LanesFrom,
    Clock,
    SharedBytes,
    DynamicSharedBytes,
    Zero,
    One,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AtomicOp {
    Add,
    Min,
    Max,
    And,
    Or,
    Xor,
    Exchange,
    CompareAndSwap,
    Increment,
    Decrement,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ShuffleMode {
    Up,
    Down,
    Butterfly,
    Index,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VoteMode {
    All,
    Any,
    Uniform,
    Ballot,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReduceOp {
    Add,
    Min,
    Max,
    And,
    Or,
    Xor,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BarrierKind {
    Sync,
    Arrive,
}

/// Where the result of `bar.red` goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BarrierReduction {
    Count(Register),
    And(Register),
    Or(Register),
}

/// What a matrix product multiplies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Element {
    /// 16 bits.
    Float(Format),
    Tf32,
    Bytes {
        a_signed: bool,
        b_signed: bool,
    },
}

impl Element {
    /// Elements of a register.
    pub fn per_register(self) -> usize {
        match self {
            Element::Float(_) => 2,
            Element::Tf32 => 1,
            Element::Bytes { .. } => 4,
        }
    }
}

/// `mma.sync`
#[derive(Clone, Debug)]
pub struct Mma {
    pub shape: &'static str,
    pub element: Element,
    /// Sums in f16, two a register, instead of f32.
    pub narrow: bool,
    pub d: Vec<Register>,
    pub a: Vec<Source>,
    pub b: Vec<Source>,
    pub c: Vec<Source>,
}

#[derive(Clone)]
pub enum Op {
    Nothing,
    Map1(Map1, Register, Source),
    Map2(Map2, Register, [Source; 2]),
    Map3(Map3, Register, [Source; 3]),
    Map4(Map4, Register, [Source; 4]),
    /// `holds` = test(a, b) `with` …, `fails` = !test(a, b) `with` …
    Compare {
        test: Test,
        holds: Register,
        fails: Option<Register>,
        with: Option<(Logic, Predicate)>,
        ab: [Source; 2],
    },
    Select {
        d: Register,
        a: Source,
        b: Source,
        p: Predicate,
    },
    Logic(Logic, Register, [Predicate; 2]),
    /// A sum or difference with a carry or borrow from a predicate register, and to one.
    Carry {
        d: Register,
        ab: [Source; 2],
        subtract: bool,
        bits: u32,
        reads: Option<Register>,
        writes: Option<Register>,
    },
    Special(Register, Special),
    /// Low parts first, each of `bits`.
    Pack {
        d: Register,
        parts: Vec<Source>,
        bits: u32,
    },
    Unpack {
        parts: Vec<Option<Register>>,
        a: Source,
        bits: u32,
    },
    /// `used`: bit per byte of the access.
    Load {
        space: Space,
        to: Vec<Option<(Register, u32)>>,
        ty: Type,
        address: Address,
        used: u32,
    },
    Store {
        space: Space,
        from: Vec<Source>,
        ty: Type,
        address: Address,
    },
    Atomic {
        space: Space,
        op: AtomicOp,
        ty: Type,
        d: Option<Register>,
        address: Address,
        b: Source,
        c: Source,
    },
    CopyAsync {
        to: Address,
        from: Address,
        bytes: u32,
        source_bytes: Option<Source>,
    },
    CommitCopies,
    /// Waits until at most so many of the newest groups are under way.
    WaitCopies(u32),
    /// Also those that are in no group yet.
    WaitAllCopies,
    LoadMatrix {
        to: Vec<Register>,
        transposed: bool,
        address: Address,
    },
    Mma(Box<Mma>),
    Shuffle {
        mode: ShuffleMode,
        d: Register,
        valid: Option<Register>,
        a: Source,
        b: Source,
        c: Source,
        members: Source,
    },
    Vote {
        mode: VoteMode,
        d: Register,
        p: Predicate,
        members: Source,
    },
    /// `match.any`; with `all`, `match.all` and whether all agree.
    Match {
        d: Register,
        all: bool,
        agree: Option<Register>,
        a: Source,
        bits: u32,
        members: Source,
    },
    Reduce {
        op: ReduceOp,
        signed: bool,
        d: Register,
        a: Source,
        members: Source,
    },
    ActiveMask(Register),
    Barrier {
        kind: BarrierKind,
        id: Source,
        threads: Option<Source>,
        reduce: Option<(BarrierReduction, Predicate)>,
    },
    WarpBarrier {
        members: Source,
    },
    Fence,
    Branch(u32),
    BranchIndex {
        a: Source,
        targets: Vec<u32>,
    },
    Exit,
    Trap(&'static str),
    /// `vprintf` of a format and a list of arguments; both, and the result, are offsets in local memory.
    Print {
        params: [u32; 2],
        result: Option<u32>,
    },
    /// Message, file, line and function of an assertion that does not hold: offsets in local memory.
    Assertion([u32; 4]),
}

#[derive(Clone)]
pub struct Instruction {
    pub op: Op,
    pub guard: Option<Predicate>,
    /// Line of the PTX text.
    pub line: u32,
    /// File number and line; (0, 0): unknown.
    pub source: (u32, u32),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Symbol {
    Variable(String),
    DynamicShared,
}

/// A kernel's instructions, calls inlined.
#[derive(Clone, Default)]
pub struct Code {
    pub instructions: Vec<Instruction>,
    pub constants: Vec<Row>,
    pub symbols: Vec<Symbol>,
    pub registers: u32,
    pub predicates: u32,
    /// Local memory of a thread, bytes.
    pub local_bytes: u32,
}

impl std::fmt::Debug for Code {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} instructions", self.instructions.len())
    }
}

pub fn map1(f: impl Fn(u64) -> u64 + Send + Sync + 'static) -> Map1 {
    Arc::new(move |a| std::array::from_fn(|lane| f(a[lane])))
}

pub fn map2(f: impl Fn(u64, u64) -> u64 + Send + Sync + 'static) -> Map2 {
    Arc::new(move |a, b| std::array::from_fn(|lane| f(a[lane], b[lane])))
}

pub fn map3(f: impl Fn(u64, u64, u64) -> u64 + Send + Sync + 'static) -> Map3 {
    Arc::new(move |a, b, c| std::array::from_fn(|lane| f(a[lane], b[lane], c[lane])))
}

pub fn map4(f: impl Fn(u64, u64, u64, u64) -> u64 + Send + Sync + 'static) -> Map4 {
    Arc::new(move |a, b, c, d| std::array::from_fn(|lane| f(a[lane], b[lane], c[lane], d[lane])))
}

pub fn test(f: impl Fn(u64, u64) -> bool + Send + Sync + 'static) -> Test {
    Arc::new(move |a, b| (0..LANES).fold(0, |mask, lane| mask | u32::from(f(a[lane], b[lane])) << lane))
}
