//! What an answer can be besides a formula.

use super::expression::Expression;

#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    Expression(Expression),
    /// In order: a point.
    Tuple(Vec<Value>),
    /// Without order.
    Set(Vec<Value>),
    /// Ends, and whether each belongs to it.
    Interval {
        ends: Box<[Value; 2]>,
        closed: [bool; 2],
    },
    Union(Vec<Value>),
    Matrix(Vec<Vec<Value>>),
    Relation {
        sign: Sign,
        sides: Box<[Value; 2]>,
    },
    /// Words, in lower case.
    Text(String),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sign {
    Equal,
    NotEqual,
    Less,
    LessOrEqual,
    In,
}

impl Value {
    pub fn equals(&self, other: &Value) -> bool {
        use Value as V;
        let in_order =
            |a: &[Value], b: &[Value]| a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.equals(b));
        match (self, other) {
            (V::Expression(a), V::Expression(b)) => a.equals(b),
            (V::Text(a), V::Text(b)) => a == b,
            (V::Tuple(a), V::Tuple(b)) => in_order(a, b),
            (V::Set(a), V::Set(b)) | (V::Union(a), V::Union(b)) => {
                a.len() == b.len() && a.iter().all(|a| b.iter().any(|b| a.equals(b)))
            }
            (V::Interval { ends: a, closed }, V::Interval { ends: b, closed: other }) => {
                closed == other && in_order(&a[..], &b[..])
            }
            (V::Matrix(a), V::Matrix(b)) => {
                a.len() == b.len() && a.iter().zip(b).all(|(a, b)| in_order(a, b))
            }
            (V::Relation { sign, sides: a }, V::Relation { sign: other, sides: b }) => {
                let turned =
                    matches!(sign, Sign::Equal | Sign::NotEqual) && a[0].equals(&b[1]) && a[1].equals(&b[0]);
                sign == other && (in_order(&a[..], &b[..]) || turned)
            }
            // `x = 3` answers a question whose solution is 3.
            (V::Relation { sign: Sign::Equal, sides }, value)
            | (value, V::Relation { sign: Sign::Equal, sides }) => {
                matches!(&sides[0], V::Expression(Expression::Name(_))) && sides[1].equals(value)
            }
            // A set of one is often written without its brackets.
            (V::Set(one), value) | (value, V::Set(one)) if one.len() == 1 => one[0].equals(value),
            _ => false,
        }
    }
}
