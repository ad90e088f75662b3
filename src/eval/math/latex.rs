//! LaTeX and plain arithmetic to values. What is not understood is `None`.

use super::{
    expression::Expression,
    value::{Sign, Value},
};

/// Brackets in brackets: more is no answer.
const DEPTH: usize = 40;
/// Tokens of an answer, likewise.
const LENGTH: usize = 400;

/// Arithmetic without commands; commas part thousands, `%` may follow.
pub fn plain(text: &str) -> Option<Value> {
    let text = text.trim().trim_start_matches('$').replace(',', "");
    let expression = Parser { tokens: tokens(&text)?, at: 0, depth: 0 }.whole()?;
    Some(Value::Expression(expression))
}

/// The inside of a formula.
pub fn parse(text: &str) -> Option<Value> {
    value(&tokens(text)?, 0)
}

#[derive(Clone, Debug, PartialEq)]
enum Token {
    Number(f64),
    /// `\frac` without the backslash.
    Command(String),
    /// The words of `\text{…}`.
    Words(String),
    Symbol(char),
}

/// Commands that change only the look.
const IGNORED: [&str; 14] = [
    "left",
    "right",
    "displaystyle",
    "quad",
    "qquad",
    "big",
    "Big",
    "bigl",
    "bigr",
    "limits",
    "mathrm",
    "mathbf",
    "!",
    ",",
];

fn tokens(text: &str) -> Option<Vec<Token>> {
    let mut found = Vec::new();
    let mut rest = text.trim();
    while let Some(c) = rest.chars().next() {
        if found.len() > LENGTH {
            return None;
        }
        if c.is_ascii_digit() || (c == '.' && rest[1..].starts_with(|c: char| c.is_ascii_digit())) {
            let (number, length) = number(rest)?;
            found.push(Token::Number(number));
            rest = &rest[length..];
        } else if c == '\\' {
            let name = &rest[1..];
            let letters = name.find(|c: char| !c.is_ascii_alphabetic()).unwrap_or(name.len());
            let length = if letters > 0 { letters } else { name.chars().next()?.len_utf8() };
            let (name, after) = name.split_at(length);
            rest = after;
            match name {
                "text" | "mbox" | "textbf" | "operatorname" => {
                    let inner = rest.strip_prefix('{')?;
                    let end = inner.find('}')?;
                    found.push(Token::Words(inner[..end].trim().to_lowercase()));
                    rest = &inner[end + 1..];
                }
                "dfrac" | "tfrac" | "cfrac" => found.push(Token::Command("frac".into())),
                "begin" | "end" => {
                    let inner = rest.strip_prefix('{')?;
                    let end = inner.find('}')?;
                    found.push(Token::Command(format!("{name}{}", inner[..end].contains("matrix"))));
                    rest = &inner[end + 1..];
                }
                "%" => found.push(Token::Symbol('%')),
                "$" | ";" | " " | ":" => {}
                "{" | "}" | "\\" => found.push(Token::Command(name.into())),
                name if IGNORED.contains(&name) => {}
                name => found.push(Token::Command(name.into())),
            }
        } else {
            if !c.is_whitespace() && c != '$' {
                found.push(Token::Symbol(c));
            }
            rest = &rest[c.len_utf8()..];
        }
    }
    Some(without_degrees(found))
}

/// A number at the start, and its length. `1{,}234` is written so to look like 1,234.
fn number(text: &str) -> Option<(f64, usize)> {
    let mut length = 0;
    let mut digits = String::new();
    let rest = |length: usize| &text[length..];
    loop {
        let more = rest(length).find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(rest(length).len());
        digits.push_str(&rest(length)[..more]);
        length += more;
        let thousands = rest(length)
            .strip_prefix("{,}")
            .filter(|after| after.len() >= 3 && after.bytes().take(3).all(|byte| byte.is_ascii_digit()));
        match thousands {
            Some(_) => length += 3,
            None => break,
        }
    }
    Some((digits.trim_end_matches('.').parse().ok()?, length))
}

fn symbol(token: &Token, wanted: char) -> bool {
    *token == Token::Symbol(wanted)
}

fn command(token: &Token, wanted: &str) -> bool {
    matches!(token, Token::Command(name) if name == wanted)
}

/// Leaves out `^\circ` and `^{\circ}`.
fn without_degrees(tokens: Vec<Token>) -> Vec<Token> {
    let mut kept: Vec<Token> = Vec::new();
    let mut tokens = tokens.into_iter().peekable();
    while let Some(token) = tokens.next() {
        if !command(&token, "circ") {
            kept.push(token);
            continue;
        }
        if kept.last().is_some_and(|last| symbol(last, '{')) {
            kept.pop();
            tokens.next_if(|next| symbol(next, '}'));
        }
        kept.pop_if(|last| symbol(last, '^'));
    }
    kept
}

fn opens(token: &Token) -> bool {
    matches!(token, Token::Symbol('(' | '[' | '{')) || command(token, "{") || command(token, "begintrue")
}

fn closes(token: &Token) -> bool {
    matches!(token, Token::Symbol(')' | ']' | '}')) || command(token, "}") || command(token, "endtrue")
}

/// The parts between tokens that `at` picks, outside all brackets.
fn split(tokens: &[Token], at: impl Fn(&Token) -> bool) -> Vec<&[Token]> {
    let (mut parts, mut depth, mut start) = (Vec::new(), 0i32, 0);
    for (index, token) in tokens.iter().enumerate() {
        depth += i32::from(opens(token)) - i32::from(closes(token));
        if depth == 0 && at(token) && !closes(token) {
            parts.push(&tokens[start..index]);
            start = index + 1;
        }
    }
    parts.push(&tokens[start..]);
    parts
}

/// Whether the first token's bracket is closed by the last token.
fn enclosed(tokens: &[Token]) -> bool {
    let mut depth = 0i32;
    for (index, token) in tokens.iter().enumerate() {
        depth += i32::from(opens(token)) - i32::from(closes(token));
        if depth == 0 {
            return index + 1 == tokens.len() && index > 0;
        }
    }
    false
}

fn values(parts: Vec<&[Token]>, depth: usize) -> Option<Vec<Value>> {
    parts.into_iter().map(|part| value(part, depth + 1)).collect()
}

fn relation(token: &Token) -> Option<(Sign, bool)> {
    Some(match token {
        Token::Symbol('=') => (Sign::Equal, false),
        Token::Symbol('<') => (Sign::Less, false),
        Token::Symbol('>') => (Sign::Less, true),
        Token::Command(name) => match name.as_str() {
            "in" => (Sign::In, false),
            "ne" | "neq" => (Sign::NotEqual, false),
            "lt" => (Sign::Less, false),
            "gt" => (Sign::Less, true),
            "le" | "leq" | "leqslant" => (Sign::LessOrEqual, false),
            "ge" | "geq" | "geqslant" => (Sign::LessOrEqual, true),
            _ => return None,
        },
        _ => return None,
    })
}

fn value(tokens: &[Token], depth: usize) -> Option<Value> {
    if tokens.is_empty() || depth > DEPTH {
        return None;
    }
    if let [Token::Words(words)] = tokens {
        return Some(Value::Text(words.clone()));
    }
    // Units behind a value say nothing.
    if let [rest @ .., Token::Words(_)] = tokens {
        return value(rest, depth + 1);
    }
    if let Some(at) = tokens.iter().position(|token| relation(token).is_some()) {
        let (sign, turned) = relation(&tokens[at])?;
        let (left, right) = (value(&tokens[..at], depth + 1)?, value(&tokens[at + 1..], depth + 1)?);
        let sides = if turned { [right, left] } else { [left, right] };
        return Some(Value::Relation { sign, sides: Box::new(sides) });
    }
    let unions = split(tokens, |token| command(token, "cup"));
    if unions.len() > 1 {
        return Some(Value::Union(values(unions, depth)?));
    }
    if enclosed(tokens) {
        let inner = &tokens[1..tokens.len() - 1];
        let parts = split(inner, |token| symbol(token, ','));
        let (open, close) = (&tokens[0], &tokens[tokens.len() - 1]);
        if command(open, "{") {
            return Some(Value::Set(values(parts, depth)?));
        }
        if command(open, "begintrue") {
            let rows = split(inner, |token| command(token, "\\"));
            let cells = |row: &[Token]| values(split(row, |token| symbol(token, '&')), depth);
            return Some(Value::Matrix(rows.into_iter().map(cells).collect::<Option<_>>()?));
        }
        if parts.len() > 1 {
            let closed = [symbol(open, '['), symbol(close, ']')];
            let mut parts = values(parts, depth)?;
            if closed != [false; 2] && parts.len() == 2 {
                let (high, low) = (parts.pop()?, parts.pop()?);
                return Some(Value::Interval { ends: Box::new([low, high]), closed });
            }
            return Some(Value::Tuple(parts));
        }
        if symbol(open, '{') || symbol(open, '(') {
            return value(inner, depth + 1);
        }
    }
    let listed = split(tokens, |token| symbol(token, ','));
    if listed.len() > 1 {
        return match thousands(&listed) {
            Some(number) => Some(Value::Expression(Expression::Number(number))),
            None => Some(Value::Set(values(listed, depth)?)),
        };
    }
    Parser { tokens: tokens.to_vec(), at: 0, depth }.whole().map(Value::Expression)
}

/// `1,234` outside brackets: groups of three digits behind the first. (Leading zeros are lost in tokens, so `1,034` reads as a list.)
fn thousands(parts: &[&[Token]]) -> Option<f64> {
    let mut total = 0.0;
    for (index, part) in parts.iter().enumerate() {
        let [Token::Number(group)] = part else { return None };
        if group.fract() != 0.0 || (index > 0 && !(100.0..1000.0).contains(group)) {
            return None;
        }
        total = total * 1000.0 + group;
    }
    Some(total)
}

struct Parser {
    tokens: Vec<Token>,
    at: usize,
    depth: usize,
}

impl Parser {
    fn whole(mut self) -> Option<Expression> {
        let sum = self.sum()?;
        (self.at == self.tokens.len()).then_some(sum)
    }

    fn peek(&self) -> Option<&Token> {
        self.tokens.get(self.at)
    }

    fn take(&mut self, wanted: char) -> bool {
        let there = self.peek().is_some_and(|token| symbol(token, wanted));
        self.at += usize::from(there);
        there
    }

    fn sum(&mut self) -> Option<Expression> {
        self.depth += 1;
        if self.depth > DEPTH {
            return None;
        }
        let negative = self.take('-') || self.take('−');
        if !negative {
            self.take('+');
        }
        let mut sum = self.product()?;
        if negative {
            sum = Expression::Negative(Box::new(sum));
        }
        loop {
            if self.take('+') {
                sum = Expression::Sum(Box::new(sum), Box::new(self.product()?));
            } else if self.take('-') || self.take('−') {
                let negative = Expression::Negative(Box::new(self.product()?));
                sum = Expression::Sum(Box::new(sum), Box::new(negative));
            } else {
                self.depth -= 1;
                return Some(sum);
            }
        }
    }

    fn product(&mut self) -> Option<Expression> {
        let mut product = self.power()?;
        loop {
            let times =
                self.take('*') || self.take('×') || self.take('·') || self.command(&["cdot", "times"]);
            if times {
                product = Expression::Product(Box::new(product), Box::new(self.signed()?));
            } else if self.take('/') || self.take('÷') || self.command(&["div"]) {
                product = Expression::Quotient(Box::new(product), Box::new(self.signed()?));
            } else if self.begins_factor() {
                product = Expression::Product(Box::new(product), Box::new(self.power()?));
            } else {
                return Some(product);
            }
        }
    }

    fn signed(&mut self) -> Option<Expression> {
        match self.take('-') {
            true => Some(Expression::Negative(Box::new(self.power()?))),
            false => self.power(),
        }
    }

    fn command(&mut self, names: &[&str]) -> bool {
        let there = matches!(self.peek(), Some(Token::Command(name)) if names.contains(&name.as_str()));
        self.at += usize::from(there);
        there
    }

    /// Whether what comes multiplies what was before without a sign. Two numbers in a row are no product.
    fn begins_factor(&self) -> bool {
        let after_number = self.at > 0 && matches!(self.tokens[self.at - 1], Token::Number(_));
        match self.peek() {
            Some(Token::Number(_)) => !after_number,
            Some(Token::Symbol(c)) => c.is_alphabetic() || matches!(c, '(' | '{'),
            Some(Token::Command(name)) => {
                matches!(name.as_str(), "frac" | "sqrt" | "pi" | "sin" | "cos" | "tan" | "ln" | "log" | "exp")
                    || GREEK.contains(&name.as_str())
            }
            _ => false,
        }
    }

    fn power(&mut self) -> Option<Expression> {
        let mut base = self.base()?;
        loop {
            if self.take('^') {
                let power = match self.take('-') {
                    true => Expression::Negative(Box::new(self.argument()?)),
                    false => self.argument()?,
                };
                base = Expression::Power(Box::new(base), Box::new(power));
            } else if self.take('!') {
                base = Expression::Function("factorial", Box::new(base));
            } else if self.take('%') {
                base = Expression::Percent(Box::new(base));
            } else {
                return Some(base);
            }
        }
    }

    /// What belongs to `\frac`, `\sqrt` and `^`: a group, or one token (one digit of a number).
    fn argument(&mut self) -> Option<Expression> {
        if let Some(Token::Number(number)) = self.peek() {
            // `\frac23` is 2/3: only the first digit belongs to it.
            let digits = number.to_string();
            if digits.len() > 1 && digits.bytes().all(|byte| byte.is_ascii_digit()) && self.splits_numbers() {
                let (first, rest) = digits.split_at(1);
                let first = first.parse().ok()?;
                self.tokens[self.at] = Token::Number(rest.parse().ok()?);
                return Some(Expression::Number(first));
            }
        }
        self.base()
    }

    /// Behind `\frac` without braces numbers fall into digits; behind `^` plain arithmetic means the whole number.
    fn splits_numbers(&self) -> bool {
        self.at > 0 && command(&self.tokens[self.at - 1], "frac")
    }

    fn base(&mut self) -> Option<Expression> {
        self.depth += 1;
        if self.depth > DEPTH {
            return None;
        }
        let token = self.peek()?.clone();
        self.at += 1;
        let found = match token {
            Token::Number(number) => Expression::Number(number),
            Token::Symbol(open @ ('(' | '{' | '[')) => {
                let inner = self.sum()?;
                let close = match open {
                    '(' => ')',
                    '{' => '}',
                    _ => ']',
                };
                self.take(close).then_some(inner)?
            }
            Token::Symbol('|') => {
                let inner = self.sum()?;
                self.take('|').then(|| Expression::Function("abs", Box::new(inner)))?
            }
            Token::Symbol('π') => Expression::Name("pi".into()),
            Token::Symbol('∞') => Expression::Infinity,
            Token::Symbol(letter) if letter.is_alphabetic() => {
                let mut name = letter.to_string();
                if self.take('_') {
                    name += &format!("_{:?}", self.base()?);
                }
                Expression::Name(name)
            }
            Token::Command(name) => self.command_base(&name)?,
            _ => return None,
        };
        self.depth -= 1;
        Some(found)
    }

    fn command_base(&mut self, name: &str) -> Option<Expression> {
        let function = |name, of| Expression::Function(name, Box::new(of));
        Some(match name {
            "frac" => {
                let top = self.argument()?;
                let bottom = self.argument()?;
                Expression::Quotient(Box::new(top), Box::new(bottom))
            }
            "sqrt" => {
                let root = match self.peek() {
                    Some(Token::Symbol('[')) => Some(self.base()?),
                    _ => None,
                };
                let of = self.base()?;
                match root {
                    None => function("sqrt", of),
                    Some(root) => {
                        let one = Box::new(Expression::Number(1.0));
                        let power = Expression::Quotient(one, Box::new(root));
                        Expression::Power(Box::new(of), Box::new(power))
                    }
                }
            }
            "pi" => Expression::Name("pi".into()),
            "infty" => Expression::Infinity,
            "sin" => function("sin", self.power()?),
            "cos" => function("cos", self.power()?),
            "tan" => function("tan", self.power()?),
            "ln" => function("ln", self.power()?),
            "log" => function("log", self.power()?),
            "exp" => function("exp", self.power()?),
            name if GREEK.contains(&name) => Expression::Name(name.into()),
            _ => return None,
        })
    }
}

const GREEK: [&str; 12] =
    ["alpha", "beta", "gamma", "delta", "epsilon", "theta", "lambda", "mu", "rho", "sigma", "phi", "omega"];
