//! Mistakes are compile errors that point at the word that is wrong. What is expected lies next to each case;
//! with `TRYBUILD=overwrite` it is written anew.

#[test]
fn mistakes_are_compile_errors_at_the_word_that_is_wrong() {
    trybuild::TestCases::new().compile_fail("tests/ui/*.rs");
}
