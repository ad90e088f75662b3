//! PTX text as tokens (PTX ISA 9.0, "Syntax").

use super::Error;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind<'a> {
    /// A name, directive, opcode with its modifiers, register, label or number.
    Word(&'a str),
    /// A quoted string, without the quotes.
    Text(&'a str),
    Mark(char),
}

#[derive(Clone, Copy, Debug)]
pub struct Token<'a> {
    pub kind: Kind<'a>,
    /// Line of the text, from 1.
    pub line: u32,
}

fn is_word(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'$' | b'%' | b'.')
}

pub fn tokens(text: &str) -> Result<Vec<Token<'_>>, Error> {
    let bytes = text.as_bytes();
    let mut found = Vec::new();
    let (mut at, mut line) = (0, 1);
    while at < bytes.len() {
        let rest = &bytes[at..];
        match rest[0] {
            b'\n' => {
                line += 1;
                at += 1;
            }
            0 => break,
            byte if byte.is_ascii_whitespace() => at += 1,
            b'/' if rest.get(1) == Some(&b'/') => {
                at += rest.iter().position(|&b| b == b'\n').unwrap_or(rest.len());
            }
            b'/' if rest.get(1) == Some(&b'*') => {
                let end = text[at + 2..].find("*/").ok_or_else(|| Error::syntax(line, "open comment"))?;
                let end = at + 2 + end + 2;
                line += bytes[at..end].iter().filter(|&&b| b == b'\n').count() as u32;
                at = end;
            }
            b'"' => {
                let end = text[at + 1..].find('"').ok_or_else(|| Error::syntax(line, "open string"))?;
                found.push(Token { kind: Kind::Text(&text[at + 1..at + 1 + end]), line });
                at += end + 2;
            }
            byte if is_word(byte) => {
                let mut end = at;
                // `::` joins the parts of a modifier, as in `.shared::cta`.
                while end < bytes.len() && (is_word(bytes[end]) || bytes[end..].starts_with(b"::")) {
                    end += if bytes[end] == b':' { 2 } else { 1 };
                }
                found.push(Token { kind: Kind::Word(&text[at..end]), line });
                at = end;
            }
            byte if byte.is_ascii() => {
                found.push(Token { kind: Kind::Mark(byte as char), line });
                at += 1;
            }
            _ => return Err(Error::syntax(line, "a character that is not ASCII")),
        }
    }
    Ok(found)
}
