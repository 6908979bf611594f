use kuasar_derive::{CmdLineParamSet, CmdLineParams};

#[derive(CmdLineParams)]
struct Machine {
    kind: String,
}

#[derive(CmdLineParamSet)]
struct Unknown {
    #[param(name = "a")]
    id: String,
}

#[derive(CmdLineParamSet)]
struct UselessKey {
    #[param(key = "a")]
    machine: Machine,
}

#[derive(CmdLineParamSet)]
struct IgnoredKey {
    #[param(key = "a", ignore)]
    id: String,
}

#[derive(CmdLineParamSet)]
struct KeyTwice {
    #[param(key = "a")]
    #[param(key = "b")]
    id: String,
}

#[derive(CmdLineParamSet)]
#[param(key = "a")]
struct Misplaced {
    id: String,
}

fn main() {}
