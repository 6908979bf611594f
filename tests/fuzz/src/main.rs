//! Feeds hostile input to whatever parses what others sent, deterministically: the same target and count is the same run.
//!
//! `kuasar-fuzz TARGET [COUNT]` runs one target, `kuasar-fuzz all [COUNT]` each. It stops at the first input that makes a
//! target panic, and shows it. A target is a file in `targets/` with `seeds()` and `run()`, and its name in the list there.

mod mutate;
mod targets;

use std::{
    fmt::Write as _,
    panic::{AssertUnwindSafe, catch_unwind},
    process::ExitCode,
    time::Instant,
};

use mutate::Mutator;
use targets::{TARGETS, Target};

const DEFAULT_COUNT: u64 = 1_000_000;

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let name = words.first().map_or("", String::as_str);
    let chosen: Vec<&Target> = TARGETS.iter().filter(|target| name == "all" || name == target.name).collect();
    let count = words.get(1).map_or(Ok(DEFAULT_COUNT), |count| count.parse());
    let (Ok(count), false) = (count, chosen.is_empty() || words.len() > 2) else {
        let names: Vec<&str> = TARGETS.iter().map(|target| target.name).collect();
        eprintln!("usage: kuasar-fuzz all|{} [COUNT]", names.join("|"));
        return ExitCode::from(2);
    };
    for target in chosen {
        let at = Instant::now();
        if let Err(input) = fuzz(target, count) {
            println!("{}: this input makes it panic: {}", target.name, hex(&input));
            return ExitCode::FAILURE;
        }
        #[allow(clippy::cast_precision_loss)]
        let rate = count as f64 / at.elapsed().as_secs_f64();
        println!("{}: {count} inputs, {rate:.0} per second, none made it panic", target.name);
    }
    ExitCode::SUCCESS
}

/// Runs a target on its seeds and then on `count` inputs made from them.
///
/// # Errors
/// The input at which it panicked.
fn fuzz(target: &Target, count: u64) -> Result<(), Vec<u8>> {
    let seeds = (target.seeds)();
    for seed in &seeds {
        run(target, seed)?;
    }
    let mut mutator = Mutator::new(seeds);
    (0..count).try_for_each(|_| run(target, mutator.next()))
}

fn run(target: &Target, input: &[u8]) -> Result<(), Vec<u8>> {
    catch_unwind(AssertUnwindSafe(|| (target.run)(input))).map_err(|_| input.to_vec())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_found_and_its_input_shown() {
        fn refuses_zero(input: &[u8]) {
            assert!(!input.contains(&0), "a zero");
        }
        let target = Target { name: "zero", seeds: || vec![b"abc".to_vec()], run: refuses_zero };
        let found = fuzz(&target, 100_000).unwrap_err();
        assert!(found.contains(&0));
        assert_eq!(fuzz(&target, 100_000).unwrap_err(), found, "it is the same run");
        assert_eq!(hex(&[0, 0xab]), "00ab");
    }
}
