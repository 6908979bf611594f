# The options of `services.kuasar` as a table, which docs/nixos.md has: name, default, meaning.
{ lib, options }:
let
  # A default that is a value of the text is told by its name.
  literal = value: if builtins.isString value then value else value.text;
  defaultOf =
    option:
    if option ? defaultText then
      "`${literal option.defaultText}`"
    else if option ? default then
      "`${builtins.toJSON option.default}`"
    else if option.readOnly or false then
      "read-only"
    else
      "the image's, or the daemon's";
  line =
    path: option:
    "| `${lib.concatStringsSep "." path}` | ${defaultOf option} | ${option.description} |\n";
  rows =
    path: set:
    lib.concatStrings (
      lib.mapAttrsToList (
        name: option:
        if option._type or "" == "option" then
          line (path ++ [ name ]) option
        else
          rows (path ++ [ name ]) option
      ) set
    );
in
rows [ ] options
