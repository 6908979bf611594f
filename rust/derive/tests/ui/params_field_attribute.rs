use kuasar_derive::CmdLineParams;

#[derive(CmdLineParams)]
struct KeyTwice {
    #[property(key = "a", key = "b")]
    id: String,
}

#[derive(CmdLineParams)]
struct EmptyKey {
    #[property(key = "")]
    id: String,
}

#[derive(CmdLineParams)]
struct KeyOfIgnored {
    #[property(ignore, key = "a")]
    id: String,
}

#[derive(CmdLineParams)]
struct NoText {
    #[property(key = 1)]
    id: String,
}

#[derive(CmdLineParams)]
struct Misplaced {
    #[params("a")]
    id: String,
}

fn main() {}
