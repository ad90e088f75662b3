//! PTX text, parsed and bound to what the interpreter runs.

mod allocate;
pub(crate) mod code;
pub(crate) mod decode;
mod lex;
mod parse;
pub(crate) mod syntax;
pub(crate) mod types;

use std::collections::HashMap;

use decode::{Decoder, Program};
use syntax::{Declaration, Initial, Literal};

/// Why a text was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    #[error("PTX line {line}: {what}")]
    Syntax { line: u32, what: String },
    #[error("PTX line {line}: softcuda does not run `{instruction}`")]
    Unsupported { line: u32, instruction: String },
}

impl Error {
    pub(crate) fn syntax(line: u32, what: impl Into<String>) -> Error {
        Error::Syntax { line, what: what.into() }
    }
}

/// A kernel's parameter in the buffer of its arguments, bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Param {
    pub offset: u32,
    pub size: u32,
    pub align: u32,
}

#[derive(Clone, Debug)]
pub struct Kernel {
    pub name: String,
    pub params: Vec<Param>,
    /// Bytes of all parameters.
    pub param_bytes: u32,
    /// Static shared memory, bytes.
    pub shared_bytes: u32,
    pub maxntid: Option<[u32; 3]>,
    pub reqntid: Option<[u32; 3]>,
    pub(crate) code: code::Code,
}

/// A `.global` or `.const` variable.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Variable {
    pub name: String,
    pub constant: bool,
    pub bytes: u64,
    pub align: u64,
    /// First bytes; the rest is zero.
    pub initial: Vec<u8>,
    /// Addresses to put into it: offset, the variable whose address it is, what to add.
    pub addresses: Vec<(u64, String, i64)>,
}

#[derive(Clone, Debug)]
pub struct Module {
    /// `.version`
    pub version: (u32, u32),
    /// `.target`'s number: 80 for `sm_80`.
    pub target: u32,
    pub kernels: Vec<Kernel>,
    pub variables: Vec<Variable>,
    /// Paths of `.file`, by number.
    pub files: HashMap<u32, String>,
}

impl Module {
    pub fn kernel(&self, name: &str) -> Option<&Kernel> {
        self.kernels.iter().find(|kernel| kernel.name == name)
    }
}

/// The module that the text describes.
///
/// # Errors
/// Text that is not PTX, or with an instruction that the interpreter lacks, wherever it stands.
pub fn parse(text: &str) -> Result<Module, Error> {
    let tokens = lex::tokens(text)?;
    let text = parse::text(&tokens)?;
    let mut routines = HashMap::new();
    for routine in &text.routines {
        // A prototype gives way to the body.
        if routine.body.is_some() || !routines.contains_key(routine.name) {
            routines.insert(routine.name, routine);
        }
    }
    let variables = text.variables.iter().map(|variable| (variable.name, variable)).collect();
    let mut kernels = Vec::new();
    for routine in text.routines.iter().filter(|routine| routine.entry && routine.body.is_some()) {
        let program = Program { routines: &routines, variables: &variables };
        let mut decoded = Decoder::decode(program, routine)?;
        allocate::allocate(&mut decoded.code);
        let (places, param_bytes) = decode::layout(&routine.params);
        let params = places.into_iter().map(|(offset, size, align)| Param { offset, size, align }).collect();
        kernels.push(Kernel {
            name: routine.name.to_owned(),
            params,
            param_bytes,
            shared_bytes: decoded.shared_bytes,
            maxntid: routine.maxntid,
            reqntid: routine.reqntid,
            code: decoded.code,
        });
    }
    let placed = text.variables.iter().filter(|variable| variable.space != ".shared");
    let variables = placed.map(variable).collect::<Result<_, _>>()?;
    let files = text.files.iter().map(|(number, path)| (*number, (*path).to_owned())).collect();
    Ok(Module { version: text.version, target: text.target, kernels, variables, files })
}

fn variable(declared: &Declaration) -> Result<Variable, Error> {
    let width = types::bytes_of(declared.kind).unwrap_or(1);
    let mut initial = Vec::new();
    let mut addresses = Vec::new();
    for value in &declared.initial {
        let bits = match value {
            Initial::Number(Literal::Int(value)) => *value,
            Initial::Number(Literal::F32(bits)) => (*bits).into(),
            Initial::Number(Literal::F64(bits)) if width == 4 => {
                (f64::from_bits(*bits) as f32).to_bits().into()
            }
            Initial::Number(Literal::F64(bits)) => *bits,
            Initial::Address(..) if width != 8 => {
                return Err(Error::syntax(declared.line, "an address in a variable of less than 64 bits"));
            }
            Initial::Address(name, offset) => {
                addresses.push((initial.len() as u64, (*name).to_owned(), *offset));
                0
            }
        };
        initial.extend_from_slice(&bits.to_le_bytes()[..width as usize]);
    }
    Ok(Variable {
        name: declared.name.to_owned(),
        constant: declared.space == ".const",
        bytes: width * declared.count,
        align: declared.align,
        initial,
        addresses,
    })
}
