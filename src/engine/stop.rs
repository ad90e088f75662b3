//! Stop strings in streamed text.
//!
//! An Aho–Corasick automaton: the depth of its state is the length of the longest end of the text that might still
//! become a stop string, which is exactly what must be held back. Work is linear in the text, whatever the number of
//! stop strings.

use std::collections::VecDeque;

/// What became of a piece of text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StopStep {
    /// Text that is safe to show: no part of a stop string.
    pub emit: String,
    /// A stop string is complete; what follows it is dropped.
    pub stopped: bool,
}

const ROOT: u32 = 0;

#[derive(Clone, Debug)]
struct Node {
    /// Sorted by byte.
    children: Vec<(u8, u32)>,
    /// The longest proper suffix that is in the trie too.
    fallback: u32,
    depth: u32,
    /// Of the longest stop string that ends here.
    matched: Option<u32>,
}

impl Node {
    fn new(depth: u32) -> Node {
        Node { children: Vec::new(), fallback: ROOT, depth, matched: None }
    }

    fn child(&self, byte: u8) -> Option<u32> {
        self.children.binary_search_by_key(&byte, |child| child.0).ok().map(|i| self.children[i].1)
    }
}

/// Finds the first stop string in text that comes in pieces. The result doesn't depend on how the text is cut up.
#[derive(Clone, Debug)]
pub struct StopMatcher {
    nodes: Vec<Node>,
    strings: Vec<String>,
    state: u32,
    /// The last `depth(state)` bytes of the text.
    held: String,
    matched: Option<u32>,
}

impl StopMatcher {
    /// Empty strings, which [`super::SamplingParams::validate`] refuses, match nothing.
    pub fn new(strings: &[String]) -> StopMatcher {
        let mut nodes = vec![Node::new(0)];
        for (number, string) in strings.iter().enumerate().filter(|(_, string)| !string.is_empty()) {
            let mut at = ROOT;
            for byte in string.bytes() {
                let node = &nodes[at as usize];
                at = match node.children.binary_search_by_key(&byte, |child| child.0) {
                    Ok(i) => node.children[i].1,
                    Err(i) => {
                        let (new, depth) = (nodes.len() as u32, node.depth + 1);
                        nodes[at as usize].children.insert(i, (byte, new));
                        nodes.push(Node::new(depth));
                        new
                    }
                };
            }
            nodes[at as usize].matched.get_or_insert(number as u32);
        }
        let mut matcher =
            StopMatcher { nodes, strings: strings.to_vec(), state: ROOT, held: String::new(), matched: None };
        matcher.link();
        matcher
    }

    /// Sets the fallbacks, breadth first: a node's fallback is shallower, so it is complete already.
    fn link(&mut self) {
        let mut queue = VecDeque::from([ROOT]);
        while let Some(parent) = queue.pop_front() {
            for (byte, child) in self.nodes[parent as usize].children.clone() {
                let fallback =
                    if parent == ROOT { ROOT } else { self.next(self.nodes[parent as usize].fallback, byte) };
                let inherited = self.nodes[fallback as usize].matched;
                let node = &mut self.nodes[child as usize];
                node.fallback = fallback;
                node.matched = node.matched.or(inherited);
                queue.push_back(child);
            }
        }
    }

    fn next(&self, mut state: u32, byte: u8) -> u32 {
        loop {
            let node = &self.nodes[state as usize];
            match node.child(byte) {
                Some(child) => return child,
                None if state == ROOT => return ROOT,
                None => state = node.fallback,
            }
        }
    }

    /// Takes the next piece of text. After a stop nothing is emitted any more.
    pub fn push(&mut self, text: &str) -> StopStep {
        if self.matched.is_some() {
            return StopStep { emit: String::new(), stopped: true };
        }
        let before = self.held.len();
        self.held.push_str(text);
        for (i, byte) in text.bytes().enumerate() {
            self.state = self.next(self.state, byte);
            self.matched = self.nodes[self.state as usize].matched;
            if let Some(number) = self.matched {
                let start = before + i + 1 - self.strings[number as usize].len();
                let mut emit = std::mem::take(&mut self.held);
                emit.truncate(start);
                return StopStep { emit, stopped: true };
            }
        }
        // Stop strings start with a whole character, so an end of the text that starts one does too.
        let safe = self.held.len() - self.nodes[self.state as usize].depth as usize;
        StopStep { emit: self.held.drain(..safe).collect(), stopped: false }
    }

    /// The text is at its end: what was held back, if no stop string was found.
    pub fn finish(&mut self) -> String {
        self.state = ROOT;
        std::mem::take(&mut self.held)
    }

    /// The stop string that ended the text.
    pub fn matched(&self) -> Option<&str> {
        self.matched.map(|number| self.strings[number as usize].as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::{Purpose, Rng, Stream};

    fn matcher(strings: &[&str]) -> StopMatcher {
        StopMatcher::new(&strings.iter().map(|s| s.to_string()).collect::<Vec<_>>())
    }

    #[test]
    fn holds_back_only_what_may_become_a_stop_string() {
        let mut stop = matcher(&["</s>", "User:"]);
        let steps = ["Hi <", "b> the", "re</", "s", "> more"].map(|piece| stop.push(piece));
        let emitted: Vec<&str> = steps.iter().map(|step| step.emit.as_str()).collect();
        assert_eq!(emitted, ["Hi ", "<b> the", "re", "", ""]);
        assert!(steps[4].stopped && !steps[3].stopped);
        assert_eq!(stop.matched(), Some("</s>"));
        assert_eq!(stop.push("x"), StopStep { emit: String::new(), stopped: true });
        assert_eq!(stop.finish(), "");
        let mut open = matcher(&["</s>"]);
        assert_eq!(open.push("a</").emit, "a");
        assert_eq!(open.finish(), "</");
    }

    #[test]
    fn non_ascii_and_nothing() {
        let mut stop = matcher(&["né", "。"]);
        assert_eq!(stop.push("un").emit, "u");
        assert_eq!(stop.push("è").emit, "nè");
        assert_eq!(stop.push("好。x"), StopStep { emit: "好".into(), stopped: true });
        let mut none = matcher(&[]);
        assert_eq!(none.push("all of it"), StopStep { emit: "all of it".into(), stopped: false });
    }

    /// Against the plain definition: the match that ends first, and of those that end together the longest.
    #[test]
    fn agrees_with_a_plain_search_however_the_text_is_cut() {
        let rng = |step| Rng::new(3, Stream::new(Purpose::Init, 0), step);
        for case in 0..500 {
            let rng = rng(case);
            let letters = |at: u32, len: u32| -> String {
                (at..at + len).map(|i| b"abc"[rng.bits(i) as usize % 3] as char).collect()
            };
            let strings: Vec<String> = (0..4).map(|s| letters(100 * s, 1 + rng.bits(90 + s) % 5)).collect();
            let text = letters(500, 40);
            let found = (1..=text.len()).find_map(|end| {
                let ending = strings.iter().filter(|string| text[..end].ends_with(string.as_str()));
                Some((end, ending.max_by_key(|string| string.len())?))
            });
            let mut stop = StopMatcher::new(&strings);
            let (mut emitted, mut at, mut cut) = (String::new(), 0, 600);
            let mut stopped = false;
            while at < text.len() && !stopped {
                let len = (1 + rng.bits(cut) as usize % 6).min(text.len() - at);
                let step = stop.push(&text[at..at + len]);
                emitted += &step.emit;
                (at, cut, stopped) = (at + len, cut + 1, step.stopped);
            }
            emitted += &stop.finish();
            match found {
                Some((end, string)) => {
                    assert_eq!(emitted, text[..end - string.len()], "{strings:?} in {text}");
                    assert_eq!(stop.matched(), Some(string.as_str()));
                }
                None => assert_eq!((emitted, stopped), (text.clone(), false), "{strings:?}"),
            }
        }
    }

    #[test]
    fn thousands_of_strings_and_a_hostile_text() {
        let strings: Vec<String> = (0..5000).map(|i| format!("{}{i}", "a".repeat(i % 100))).collect();
        let mut stop = StopMatcher::new(&strings);
        let mut emitted = 0;
        for _ in 0..1000 {
            emitted += stop.push(&"a".repeat(1000)).emit.len();
        }
        assert_eq!(emitted, 1_000_000 - 99);
        assert!(stop.push("7").stopped);
    }
}
