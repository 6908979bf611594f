use kuasar_derive::CmdLineParams;

#[derive(CmdLineParams)]
#[params("netdev", "device")]
struct WithoutParam {
    #[property(param = "netdev")]
    id: String,
    #[property(key = "mac")]
    mac_address: String,
}

#[derive(CmdLineParams)]
#[params("netdev", "device")]
struct WithoutAttribute {
    #[property(param = "netdev")]
    #[property(param = "device")]
    id: String,
    index: u32,
}

fn main() {}
