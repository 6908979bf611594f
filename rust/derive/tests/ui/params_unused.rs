use kuasar_derive::CmdLineParams;

#[derive(CmdLineParams)]
#[params("netdev", "device")]
struct Tap {
    #[property(param = "netdev")]
    id: String,
}

fn main() {}
