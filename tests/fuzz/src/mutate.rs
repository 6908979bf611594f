//! Makes inputs out of seeds.

/// Longest input.
const MAX: usize = 16 * 1024;
/// Bytes that parsers stumble over.
const TOKENS: [&[u8]; 24] = [
    b"\0",
    b"\n",
    b"\r\n",
    b" ",
    b"=",
    b",",
    b":",
    b"/",
    b"..",
    b"../",
    b"\"",
    b"\\u0000",
    b"{",
    b"}",
    b"[",
    b"]",
    b"null",
    b"-1",
    b"0",
    b"4294967296",
    b"18446744073709551616",
    b"1e999",
    b"\xff\xfe",
    b"\xf0\x9f\x92\xa9",
];

/// An endless series of inputs, the same for the same seeds and start.
pub(crate) struct Mutator {
    seeds: Vec<Vec<u8>>,
    state: u64,
    input: Vec<u8>,
}

impl Mutator {
    pub(crate) fn new(seeds: Vec<Vec<u8>>, start: u64) -> Self {
        Self { seeds, state: start, input: Vec::new() }
    }

    /// The next input.
    pub(crate) fn next(&mut self) -> &[u8] {
        let seed = self.seed();
        self.input.clone_from(&seed);
        for _ in 0..=self.below(6) {
            self.change();
        }
        self.input.truncate(MAX);
        &self.input
    }

    /// `splitmix64`: short, and without a bad start.
    fn random(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.state ^ (self.state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number below `limit`, 0 if there is none.
    fn below(&mut self, limit: usize) -> usize {
        let random = usize::try_from(self.random() >> 33).unwrap_or(0);
        random.checked_rem(limit).unwrap_or(0)
    }

    fn seed(&mut self) -> Vec<u8> {
        let n = self.below(self.seeds.len());
        self.seeds.get(n).cloned().unwrap_or_default()
    }

    /// A place in the input and what follows it, up to `most` bytes.
    fn piece(&mut self, most: usize) -> std::ops::Range<usize> {
        let from = self.below(self.input.len() + 1);
        let length = self.below(most + 1).min(self.input.len() - from);
        from..from + length
    }

    fn change(&mut self) {
        let byte = u8::try_from(self.random() & 0xff).unwrap_or(0);
        match self.below(8) {
            0 => {
                let at = self.below(self.input.len());
                if let Some(changed) = self.input.get_mut(at) {
                    *changed ^= 1 << (byte & 7);
                }
            }
            1 => {
                let at = self.below(self.input.len());
                if let Some(changed) = self.input.get_mut(at) {
                    *changed = byte;
                }
            }
            2 => {
                let piece = self.piece(32);
                drop(self.input.drain(piece));
            }
            3 => {
                let end = self.below(self.input.len() + 1);
                self.input.truncate(end);
            }
            4 | 5 => {
                let (piece, token) = (self.piece(4), self.below(TOKENS.len()));
                let token = TOKENS.get(token).copied().unwrap_or_default();
                self.input.splice(piece, token.iter().copied());
            }
            6 => {
                // A piece of itself, again.
                let (from, to) = (self.piece(256), self.below(self.input.len() + 1));
                let again = self.input.get(from).unwrap_or_default().to_vec();
                self.input.splice(to..to, again);
            }
            _ => {
                // The end of another seed behind the beginning of this.
                let (other, end) = (self.seed(), self.below(self.input.len() + 1));
                let from = self.below(other.len() + 1);
                self.input.truncate(end);
                self.input.extend(other.get(from..).unwrap_or_default());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn inputs_differ_and_come_again() {
        let seeds = || vec![b"{\"a\": [1, 2, 3]}".to_vec(), Vec::new()];
        let (mut one, mut other) = (Mutator::new(seeds(), 7), Mutator::new(seeds(), 7));
        let mut seen = HashSet::new();
        for _ in 0..10_000 {
            let input = one.next().to_vec();
            assert!(input.len() <= MAX);
            assert_eq!(input, other.next());
            seen.insert(input);
        }
        assert!(seen.len() > 5_000, "{}", seen.len());
    }

    #[test]
    fn no_seeds_are_no_trouble() {
        let mut mutator = Mutator::new(Vec::new(), 7);
        for _ in 0..1_000 {
            mutator.next();
        }
    }
}
