//! Which modifiers an opcode may have: one that is not known is refused, not passed over.

use super::Opcode;

const ROUNDINGS: [&str; 4] = ["rn", "rz", "rm", "rp"];

const COMPARISONS: [&str; 22] = [
    "eq", "ne", "lt", "le", "gt", "ge", "lo", "ls", "hi", "hs", "equ", "neu", "ltu", "leu", "gtu", "geu",
    "num", "nan", "and", "or", "xor", "ftz",
];

/// The modifiers of opcodes that leave it to this table; loads, stores and copies look at their own.
fn is_known(op: &Opcode, modifier: &str) -> bool {
    let is_float = op.types.first().is_some_and(|ty| ty.is_float());
    let one_of = |known: &[&str]| known.contains(&modifier);
    match op.name {
        "add" | "sub" | "mul" | "fma" | "mad" | "div" | "rcp" | "sqrt" if is_float => {
            ROUNDINGS.contains(&modifier) || one_of(&["ftz", "sat", "relu", "approx", "full"])
        }
        "add" | "sub" => one_of(&["sat", "cc"]),
        "addc" | "subc" => one_of(&["cc"]),
        "mul" | "mul24" => one_of(&["lo", "hi", "wide"]),
        "mad" | "mad24" | "madc" => one_of(&["lo", "hi", "wide", "sat", "cc"]),
        "rsqrt" | "ex2" | "lg2" | "sin" | "cos" | "tanh" => one_of(&["approx", "ftz"]),
        "rcp" | "div" | "rem" | "sad" | "shl" | "shr" | "bfe" | "bfi" | "popc" | "clz" | "brev" | "cnot"
        | "dp4a" | "lop3" | "selp" | "copysign" | "activemask" | "fma" | "sqrt" => false,
        "and" | "or" | "xor" | "not" | "mov" => one_of(&["pred"]),
        "abs" | "neg" | "slct" => one_of(&["ftz"]),
        "min" | "max" => is_float && one_of(&["ftz", "NaN"]),
        "shf" => one_of(&["l", "r", "wrap", "clamp"]),
        "bfind" => one_of(&["shiftamt"]),
        "bmsk" => one_of(&["wrap", "clamp"]),
        "dp2a" => one_of(&["lo", "hi"]),
        "prmt" => one_of(&["f4e", "b4e", "rc8", "ecl", "ecr", "rc16"]),
        "set" | "setp" => COMPARISONS.contains(&modifier),
        "testp" => one_of(&["finite", "infinite", "number", "notanumber", "normal", "subnormal"]),
        "cvt" => {
            ROUNDINGS.contains(&modifier)
                || one_of(&[
                    "rni",
                    "rzi",
                    "rmi",
                    "rpi",
                    "rna",
                    "ftz",
                    "sat",
                    "relu",
                    "satfinite",
                    "pack",
                    "tf32",
                ])
        }
        "shfl" => one_of(&["sync", "up", "down", "bfly", "idx"]),
        "vote" => one_of(&["sync", "all", "any", "uni", "ballot", "pred"]),
        "match" => one_of(&["sync", "all", "any"]),
        "redux" => one_of(&["sync", "add", "min", "max", "and", "or", "xor"]),
        "bar" | "barrier" => {
            one_of(&["sync", "arrive", "red", "warp", "popc", "and", "or", "aligned", "pred", "cta"])
        }
        "ldmatrix" => one_of(&["sync", "aligned", "m8n8", "x1", "x2", "x4", "trans", "shared"]),
        "mma" => one_of(&["sync", "aligned", "m16n8k8", "m16n8k16", "m16n8k32", "row", "col", "tf32"]),
        "cvta" => one_of(&["to", "global", "shared", "local", "const", "param"]),
        "isspacep" => one_of(&["global", "shared", "local", "const", "param"]),
        "bra" | "call" => one_of(&["uni"]),
        "brx" => one_of(&["idx", "uni"]),
        "ret" => one_of(&["uni"]),
        "exit" | "trap" | "brkpt" => false,
        _ => true,
    }
}

pub fn are_known(op: &Opcode) -> bool {
    op.modifiers.iter().all(|modifier| is_known(op, modifier))
}
