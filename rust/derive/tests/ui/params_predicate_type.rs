use kuasar_derive::CmdLineParams;

#[derive(CmdLineParams)]
struct NoBool {
    #[property(predicate = "self.id")]
    id: u32,
}

fn main() {}
