//! Tokens as directives, statements and operands: names are not looked up yet.

use super::Error;
use super::lex::{Kind, Token};
use super::syntax::{Declaration, Initial, Item, Literal, Operand, Routine, Statement, Text};

pub fn text<'a>(tokens: &[Token<'a>]) -> Result<Text<'a>, Error> {
    Parser { tokens, at: 0, source: (0, 0), used_bytes: None }.text()
}

/// A number, if the word is one.
pub fn literal(word: &str) -> Option<Literal> {
    if !word.starts_with(|c: char| c.is_ascii_digit() || c == '.') {
        return None;
    }
    let lower = word.to_ascii_lowercase();
    if let Some(digits) = lower.strip_prefix("0f")
        && digits.len() == 8
    {
        return u32::from_str_radix(digits, 16).ok().map(Literal::F32);
    }
    if let Some(digits) = lower.strip_prefix("0d")
        && digits.len() == 16
    {
        return u64::from_str_radix(digits, 16).ok().map(Literal::F64);
    }
    let whole = lower.strip_suffix('u').unwrap_or(&lower);
    let integer = if let Some(digits) = whole.strip_prefix("0x") {
        u64::from_str_radix(digits, 16)
    } else if let Some(digits) = whole.strip_prefix("0b") {
        u64::from_str_radix(digits, 2)
    } else if whole.len() > 1 && whole.starts_with('0') && !whole.contains('.') {
        u64::from_str_radix(whole, 8)
    } else {
        whole.parse()
    };
    match integer {
        Ok(value) => Some(Literal::Int(value)),
        Err(_) => lower.parse::<f64>().ok().map(|value| Literal::F64(value.to_bits())),
    }
}

fn negated(value: Literal) -> Literal {
    match value {
        Literal::Int(value) => Literal::Int(value.wrapping_neg()),
        Literal::F32(bits) => Literal::F32(bits ^ 1 << 31),
        Literal::F64(bits) => Literal::F64(bits ^ 1 << 63),
    }
}

struct Parser<'t, 'a> {
    tokens: &'t [Token<'a>],
    at: usize,
    source: (u32, u32),
    used_bytes: Option<u32>,
}

impl<'a> Parser<'_, 'a> {
    fn peek(&self) -> Option<Kind<'a>> {
        self.tokens.get(self.at).map(|token| token.kind)
    }

    fn line(&self) -> u32 {
        let last = self.tokens.len().saturating_sub(1);
        self.tokens.get(self.at.min(last)).map_or(0, |token| token.line)
    }

    fn fail<T>(&self, wanted: &str) -> Result<T, Error> {
        let found = match self.peek() {
            None => "the end".to_owned(),
            Some(Kind::Word(word)) => format!("`{word}`"),
            Some(Kind::Text(text)) => format!("\"{text}\""),
            Some(Kind::Mark(mark)) => format!("`{mark}`"),
        };
        Err(Error::syntax(self.line(), format!("{wanted} expected, {found} found")))
    }

    fn take(&mut self, mark: char) -> bool {
        let found = self.peek() == Some(Kind::Mark(mark));
        self.at += usize::from(found);
        found
    }

    fn expect(&mut self, mark: char) -> Result<(), Error> {
        if self.take(mark) { Ok(()) } else { self.fail(&format!("`{mark}`")) }
    }

    fn word(&mut self) -> Result<&'a str, Error> {
        let Some(Kind::Word(word)) = self.peek() else { return self.fail("a name") };
        self.at += 1;
        Ok(word)
    }

    fn take_word(&mut self, word: &str) -> bool {
        let found = self.peek() == Some(Kind::Word(word));
        self.at += usize::from(found);
        found
    }

    fn number(&mut self) -> Result<Literal, Error> {
        let minus = self.take('-');
        let Some(Kind::Word(word)) = self.peek() else { return self.fail("a number") };
        let Some(value) = literal(word) else { return self.fail("a number") };
        self.at += 1;
        Ok(if minus { negated(value) } else { value })
    }

    fn integer(&mut self) -> Result<u64, Error> {
        match self.number()? {
            Literal::Int(value) => Ok(value),
            _ => self.fail("a whole number before this"),
        }
    }

    fn skip_line(&mut self) {
        let line = self.line();
        while self.tokens.get(self.at).is_some_and(|token| token.line == line) {
            self.at += 1;
        }
    }

    fn text(mut self) -> Result<Text<'a>, Error> {
        let mut text = Text::default();
        while let Some(kind) = self.peek() {
            let Kind::Word(word) = kind else {
                if self.take(';') {
                    continue;
                }
                return self.fail("a directive");
            };
            match word {
                ".version" => {
                    self.at += 1;
                    let version = self.word()?;
                    let parts = version
                        .split_once('.')
                        .and_then(|(major, minor)| Some((major.parse().ok()?, minor.parse().ok()?)));
                    let Some(parts) = parts else { return self.fail("a version before this") };
                    text.version = parts;
                }
                ".target" => {
                    self.at += 1;
                    let target = self.word()?;
                    let digits = target.trim_start_matches("sm_").trim_end_matches(['a', 'f']);
                    let Ok(number) = digits.parse() else { return self.fail("a target before this") };
                    text.target = number;
                    while self.take(',') {
                        self.word()?;
                    }
                }
                ".address_size" => {
                    self.at += 1;
                    if self.integer()? != 64 {
                        return self.fail("64 before this");
                    }
                }
                ".file" => {
                    self.at += 1;
                    let number = self.integer()? as u32;
                    let Some(Kind::Text(path)) = self.peek() else { return self.fail("a path") };
                    text.files.push((number, path));
                    self.skip_line();
                }
                ".section" => {
                    while !self.take('{') {
                        self.at += 1;
                    }
                    while !self.take('}') {
                        if self.peek().is_none() {
                            return self.fail("`}`");
                        }
                        self.at += 1;
                    }
                }
                ".pragma" => self.pragma()?,
                ".loc" => self.loc()?,
                ".visible" | ".extern" | ".weak" | ".common" | ".noreturn" => self.at += 1,
                ".entry" | ".func" => text.routines.push(self.routine()?),
                ".global" | ".const" | ".shared" => text.variables.extend(self.variables()?),
                _ => return self.fail("a directive"),
            }
        }
        Ok(text)
    }

    fn loc(&mut self) -> Result<(), Error> {
        let line = self.line();
        self.at += 1;
        self.source = (self.integer()? as u32, self.integer()? as u32);
        while self.tokens.get(self.at).is_some_and(|token| token.line == line) {
            self.at += 1;
        }
        Ok(())
    }

    fn pragma(&mut self) -> Result<(), Error> {
        self.at += 1;
        loop {
            let Some(Kind::Text(text)) = self.peek() else { return self.fail("a string") };
            if let Some(mask) = text.strip_prefix("used_bytes_mask") {
                match literal(mask.trim()) {
                    Some(Literal::Int(mask)) => self.used_bytes = Some(mask as u32),
                    _ => return self.fail("a mask"),
                }
            }
            self.at += 1;
            if !self.take(',') {
                return self.expect(';');
            }
        }
    }

    fn dims(&mut self) -> Result<[u32; 3], Error> {
        let mut dims = [1; 3];
        for (axis, dim) in dims.iter_mut().enumerate() {
            if axis > 0 && !self.take(',') {
                break;
            }
            *dim = self.integer()? as u32;
        }
        Ok(dims)
    }

    fn routine(&mut self) -> Result<Routine<'a>, Error> {
        let line = self.line();
        let entry = self.word()? == ".entry";
        let results = if !entry && self.take('(') { self.parameters()? } else { Vec::new() };
        let name = self.word()?;
        let params = if self.take('(') { self.parameters()? } else { Vec::new() };
        let (mut maxntid, mut reqntid) = (None, None);
        loop {
            match self.peek() {
                Some(Kind::Word(".maxntid")) => {
                    self.at += 1;
                    maxntid = Some(self.dims()?);
                }
                Some(Kind::Word(".reqntid")) => {
                    self.at += 1;
                    reqntid = Some(self.dims()?);
                }
                Some(Kind::Word(".minnctapersm" | ".maxnctapersm" | ".maxnreg")) => {
                    self.at += 1;
                    self.integer()?;
                }
                Some(Kind::Word(".noreturn")) => self.at += 1,
                Some(Kind::Word(".pragma")) => self.pragma()?,
                Some(Kind::Mark(';')) => {
                    self.at += 1;
                    return Ok(Routine { line, name, entry, results, params, maxntid, reqntid, body: None });
                }
                Some(Kind::Mark('{')) => break,
                _ => return self.fail("a kernel's directive or body"),
            }
        }
        let body = Some(self.body()?);
        Ok(Routine { line, name, entry, results, params, maxntid, reqntid, body })
    }

    /// The parameters up to and with the closing parenthesis.
    fn parameters(&mut self) -> Result<Vec<Declaration<'a>>, Error> {
        let mut found = Vec::new();
        while !self.take(')') {
            if self.peek() != Some(Kind::Word(".param")) {
                return self.fail("`.param`");
            }
            found.push(self.declaration()?);
            self.take(',');
        }
        Ok(found)
    }

    fn variables(&mut self) -> Result<Vec<Declaration<'a>>, Error> {
        let first = self.declaration()?;
        let mut found = vec![first];
        while self.take(',') {
            let like = found[0].clone();
            found.push(self.declarator(like)?);
        }
        self.expect(';')?;
        Ok(found)
    }

    /// `.space .align n .type name[n] = {…}`
    fn declaration(&mut self) -> Result<Declaration<'a>, Error> {
        let line = self.line();
        let space = self.word()?;
        let (mut align, mut kind, mut vector) = (None, None, 1);
        loop {
            match self.peek() {
                Some(Kind::Word(".align")) => {
                    self.at += 1;
                    align = Some(self.integer()?);
                }
                Some(Kind::Word(".ptr")) => {
                    self.at += 1;
                    // What a pointer parameter points to: its space and alignment.
                    while let Some(Kind::Word(".global" | ".const" | ".shared" | ".local")) = self.peek() {
                        self.at += 1;
                    }
                    if self.take_word(".align") {
                        self.integer()?;
                    }
                }
                Some(Kind::Word(".v2")) => {
                    self.at += 1;
                    vector = 2;
                }
                Some(Kind::Word(".v4")) => {
                    self.at += 1;
                    vector = 4;
                }
                Some(Kind::Word(word)) if word.starts_with('.') => {
                    self.at += 1;
                    kind = Some(&word[1..]);
                }
                _ => break,
            }
        }
        let Some(kind) = kind else { return self.fail("a type before this") };
        let size = super::types::bytes_of(kind)
            .ok_or_else(|| Error::syntax(line, format!("unknown type `{kind}`")))?;
        let align = align.unwrap_or(size * vector);
        let like = Declaration { line, space, align, kind, name: "", count: vector, initial: Vec::new() };
        self.declarator(like)
    }

    fn declarator(&mut self, like: Declaration<'a>) -> Result<Declaration<'a>, Error> {
        let mut declared = Declaration { name: self.word()?, initial: Vec::new(), ..like };
        while self.take('[') {
            if self.take(']') {
                declared.count = 0;
                continue;
            }
            declared.count *= self.integer()?;
            self.expect(']')?;
        }
        if self.take('=') {
            self.initial(&mut declared.initial)?;
        }
        Ok(declared)
    }

    fn initial(&mut self, values: &mut Vec<Initial<'a>>) -> Result<(), Error> {
        if self.take('{') {
            while !self.take('}') {
                self.initial(values)?;
                self.take(',');
            }
            return Ok(());
        }
        if let Some(Kind::Word(word)) = self.peek()
            && literal(word).is_none()
        {
            self.at += 1;
            if word == "generic" && self.take('(') {
                let name = self.word()?;
                self.expect(')')?;
                let offset = if self.take('+') { self.integer()? } else { 0 };
                values.push(Initial::Address(name, offset as i64));
                return Ok(());
            }
            let offset = if self.take('+') { self.integer()? } else { 0 };
            values.push(Initial::Address(word, offset as i64));
            return Ok(());
        }
        values.push(Initial::Number(self.number()?));
        Ok(())
    }

    fn body(&mut self) -> Result<Vec<Item<'a>>, Error> {
        self.expect('{')?;
        let mut items = Vec::new();
        let mut depth = 1;
        loop {
            match self.peek() {
                None => return self.fail("`}`"),
                Some(Kind::Mark('{')) => {
                    self.at += 1;
                    depth += 1;
                    items.push(Item::Open);
                }
                Some(Kind::Mark('}')) => {
                    self.at += 1;
                    depth -= 1;
                    if depth == 0 {
                        return Ok(items);
                    }
                    items.push(Item::Close);
                }
                Some(Kind::Mark(';')) => self.at += 1,
                Some(Kind::Word(".loc")) => self.loc()?,
                Some(Kind::Word(".pragma")) => self.pragma()?,
                Some(Kind::Word(".reg")) => {
                    self.at += 1;
                    let kind = self.word()?;
                    self.registers(kind, &mut items)?;
                }
                // The headers of half precision write it in one word.
                Some(Kind::Word(word)) if word.starts_with(".reg.") => {
                    self.at += 1;
                    self.registers(&word[4..], &mut items)?;
                }
                Some(Kind::Word(".shared" | ".local" | ".param" | ".global" | ".const")) => {
                    items.extend(self.variables()?.into_iter().map(Item::Variable));
                }
                Some(Kind::Word(name))
                    if self.tokens.get(self.at + 1).map(|t| t.kind) == Some(Kind::Mark(':')) =>
                {
                    self.at += 2;
                    if self.take_word(".branchtargets") {
                        let mut targets = Vec::new();
                        while !self.take(';') {
                            targets.push(self.word()?);
                            self.take(',');
                        }
                        items.push(Item::Targets(name, targets));
                    } else if self.take_word(".callprototype") {
                        while !self.take(';') {
                            self.at += 1;
                        }
                    } else {
                        items.push(Item::Label(name));
                    }
                }
                Some(_) => items.push(Item::Statement(self.statement()?)),
            }
        }
    }

    fn registers(&mut self, kind: &'a str, items: &mut Vec<Item<'a>>) -> Result<(), Error> {
        let kind = kind.trim_start_matches('.');
        loop {
            let name = self.word()?;
            let count = if self.take('<') {
                let count = self.integer()? as u32;
                self.expect('>')?;
                Some(count)
            } else {
                None
            };
            items.push(Item::Registers(kind, name, count));
            if !self.take(',') {
                return self.expect(';');
            }
        }
    }

    fn statement(&mut self) -> Result<Statement<'a>, Error> {
        let guard = if self.take('@') {
            let negated = self.take('!');
            Some((self.word()?, negated))
        } else {
            None
        };
        let line = self.line();
        let opcode = self.word()?;
        let mut operands = Vec::new();
        while !self.take(';') {
            operands.push(self.operand()?);
            if !self.take(',') {
                self.expect(';')?;
                break;
            }
        }
        let used_bytes = self.used_bytes.take();
        Ok(Statement { line, source: self.source, guard, opcode, operands, used_bytes })
    }

    fn operand(&mut self) -> Result<Operand<'a>, Error> {
        let first = match self.peek() {
            Some(Kind::Mark('{')) => {
                self.at += 1;
                Operand::Vector(self.operands_until('}')?)
            }
            Some(Kind::Mark('(')) => {
                self.at += 1;
                Operand::List(self.operands_until(')')?)
            }
            Some(Kind::Mark('[')) => {
                self.at += 1;
                self.address()?
            }
            Some(Kind::Mark('!')) => {
                self.at += 1;
                Operand::Not(self.word()?)
            }
            Some(Kind::Word(word)) if literal(word).is_none() => {
                self.at += 1;
                match self.peek() {
                    Some(Kind::Mark('+')) => {
                        self.at += 1;
                        Operand::Sum(word, self.integer()? as i64)
                    }
                    Some(Kind::Mark('-')) => Operand::Sum(word, self.integer()? as i64),
                    _ => Operand::Name(word),
                }
            }
            _ => Operand::Number(self.number()?),
        };
        if self.take('|') {
            return Ok(Operand::Pair(Box::new((first, self.operand()?))));
        }
        Ok(first)
    }

    fn operands_until(&mut self, end: char) -> Result<Vec<Operand<'a>>, Error> {
        let mut found = Vec::new();
        while !self.take(end) {
            found.push(self.operand()?);
            if !self.take(',') {
                self.expect(end)?;
                break;
            }
        }
        Ok(found)
    }

    fn address(&mut self) -> Result<Operand<'a>, Error> {
        let address = match self.peek() {
            Some(Kind::Word(word)) if literal(word).is_none() => {
                self.at += 1;
                let plus = self.take('+');
                let offset = if plus || self.peek() == Some(Kind::Mark('-')) { self.integer()? } else { 0 };
                Operand::Address(Some(word), offset as i64)
            }
            _ => Operand::Address(None, self.integer()? as i64),
        };
        self.expect(']')?;
        Ok(address)
    }
}
