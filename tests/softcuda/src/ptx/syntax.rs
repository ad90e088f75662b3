//! What a PTX file says: directives, statements, operands, with names as written.

/// A number as written; its meaning depends on the instruction's type.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Literal {
    Int(u64),
    /// `0f` and eight digits.
    F32(u32),
    /// `0d` and sixteen digits, or a decimal.
    F64(u64),
}

#[derive(Clone, Debug, PartialEq)]
pub enum Operand<'a> {
    Name(&'a str),
    Number(Literal),
    /// `[base + offset]`; no base: an absolute address.
    Address(Option<&'a str>, i64),
    /// `symbol + offset`
    Sum(&'a str, i64),
    Vector(Vec<Operand<'a>>),
    /// `d|p`
    Pair(Box<(Operand<'a>, Operand<'a>)>),
    Not(&'a str),
    /// The parenthesised lists of a call.
    List(Vec<Operand<'a>>),
}

#[derive(Clone, Debug)]
pub struct Statement<'a> {
    pub line: u32,
    /// File number and line of the last `.loc`; (0, 0): none yet.
    pub source: (u32, u32),
    /// Predicate, and whether it is negated.
    pub guard: Option<(&'a str, bool)>,
    pub opcode: &'a str,
    pub operands: Vec<Operand<'a>>,
    /// Bytes of a load that are used, where `.pragma "used_bytes_mask"` says so.
    pub used_bytes: Option<u32>,
}

/// One initial value: a number, or the address of a symbol plus an offset.
#[derive(Clone, Debug, PartialEq)]
pub enum Initial<'a> {
    Number(Literal),
    Address(&'a str, i64),
}

#[derive(Clone, Debug)]
pub struct Declaration<'a> {
    pub line: u32,
    pub space: &'a str,
    /// Alignment, bytes.
    pub align: u64,
    pub kind: &'a str,
    pub name: &'a str,
    /// Elements; 0: an array whose size the launch gives.
    pub count: u64,
    pub initial: Vec<Initial<'a>>,
}

#[derive(Clone, Debug)]
pub enum Item<'a> {
    Label(&'a str),
    /// Type, stem, how many: `%r<4>` is `%r0` to `%r3`; none: one register of that very name.
    Registers(&'a str, &'a str, Option<u32>),
    Variable(Declaration<'a>),
    Open,
    Close,
    /// `name: .branchtargets a, b;`
    Targets(&'a str, Vec<&'a str>),
    Statement(Statement<'a>),
}

#[derive(Clone, Debug)]
pub struct Routine<'a> {
    pub line: u32,
    pub name: &'a str,
    pub entry: bool,
    pub results: Vec<Declaration<'a>>,
    pub params: Vec<Declaration<'a>>,
    pub maxntid: Option<[u32; 3]>,
    pub reqntid: Option<[u32; 3]>,
    /// None: a prototype.
    pub body: Option<Vec<Item<'a>>>,
}

#[derive(Default)]
pub struct Text<'a> {
    pub version: (u32, u32),
    pub target: u32,
    pub routines: Vec<Routine<'a>>,
    pub variables: Vec<Declaration<'a>>,
    /// `.file` numbers and paths.
    pub files: Vec<(u32, &'a str)>,
}
