//! The guest's words on the connection that it opens, and the part of them that people get to see.

use vmm_sandboxer::fuzz;

pub(crate) fn seeds() -> Vec<Vec<u8>> {
    vec![
        b"{\"ready\":{\"agent\":\"0.1.0\",\"uptime_ns\":5,\"root\":\"ext4 ro\"}}\n".to_vec(),
        "{\"fatal\":{\"reason\":\"no cgroup v2 \u{202e}\\u001b[2J\"}}\n".as_bytes().to_vec(),
        "{\"\u{202e}\u{7}\":1}\n".as_bytes().to_vec(),
        vec![b'x'; 5000],
    ]
}

pub(crate) fn run(input: &[u8]) {
    for text in fuzz::ready_line(input) {
        // Each of 512 characters may be escaped, by ten at most.
        assert!(text.chars().count() <= 5200, "{} characters", text.chars().count());
        let moves = |c: char| {
            c.is_control() || matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
        };
        assert!(!text.contains(moves), "{text:?}");
    }
}
