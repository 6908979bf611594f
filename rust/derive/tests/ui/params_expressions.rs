use kuasar_derive::CmdLineParams;

#[derive(CmdLineParams)]
struct NoExpression {
    #[property(predicate = "self.id >")]
    id: u32,
}

#[derive(CmdLineParams)]
struct NoPath {
    #[property(generator = "1 + 1")]
    id: u32,
}

#[derive(CmdLineParams)]
struct NoField {
    #[property(predicate = "self.other > 0")]
    id: u32,
}

#[derive(CmdLineParams)]
struct NoBool {
    #[property(predicate = "self.id")]
    id: u32,
}

#[derive(CmdLineParams)]
struct NoFunction {
    #[property(generator = "no_such_function")]
    id: u32,
}

struct Silent;

#[derive(CmdLineParams)]
struct NoDisplay {
    id: Silent,
}

fn main() {}
