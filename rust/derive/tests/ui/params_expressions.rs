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

fn main() {}
