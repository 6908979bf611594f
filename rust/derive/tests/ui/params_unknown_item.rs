use kuasar_derive::CmdLineParams;

#[derive(CmdLineParams)]
struct Rtc {
    base: String,
    #[property(kay = "clock")]
    clock: String,
}

#[derive(CmdLineParams)]
struct Path {
    #[property(some::path = "x")]
    clock: String,
}

fn main() {}
