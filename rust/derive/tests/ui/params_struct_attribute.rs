use kuasar_derive::CmdLineParams;

#[derive(CmdLineParams)]
#[params("a", "b", "a")]
struct Twice {
    #[property(param = "a")]
    #[property(param = "b")]
    id: String,
}

#[derive(CmdLineParams)]
#[params()]
struct Empty {
    id: String,
}

#[derive(CmdLineParams)]
#[params("")]
struct EmptyName {
    id: String,
}

#[derive(CmdLineParams)]
#[params(name = "a")]
struct NoName {
    id: String,
}

#[derive(CmdLineParams)]
#[params("a")]
#[params("b")]
struct TwoAttributes {
    id: String,
}

#[derive(CmdLineParams)]
#[property(key = "a")]
struct Misplaced {
    id: String,
}

fn main() {}
