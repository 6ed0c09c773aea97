"""Words for keys and lists, in place of the package wonderwords, which the original RULER uses."""

_ADJECTIVES = """
able ancient angry autumn bitter blank bold brave brief bright brisk broad broken bronze busy calm careful
careless charming cheap cheerful chilly chubby civil clean clear clever cloudy clumsy coarse cold common cool
copper costly cosy crisp crooked cruel curious curly damp daring dark deaf dear decent deep delicate dense dim
distant dizzy double drab dreary dry dull dusty eager early earnest easy elastic elderly elegant empty enormous
equal even exact faint fair faithful false familiar famous fancy fast feeble fierce final fine firm flat fluffy
foggy foolish formal fragile frank free fresh friendly frosty frozen full funny gentle giant glad gloomy glossy
golden good graceful grand grateful gray great greedy green grim grumpy guilty handsome handy happy hard harsh
hasty healthy heavy helpful hollow holy honest hot huge humble hungry icy ideal idle ill immense innocent itchy
jealous jolly joyful juicy keen kind large late lazy lean light limp little lively local lonely long loose loud
lovely loyal lucky lunar mad major marine massive mature mellow merry mighty mild minor misty modern modest
moist mute muddy narrow nasty neat nervous new nimble noble noisy normal numb obedient odd old open orange
ordinary oval pale patient perfect plain playful pleasant plump polite poor precious pretty prompt proper proud
public pure purple puzzled quaint quick quiet rapid rare raw ready real red regular rich rigid ripe robust
rotten rough round royal rude rural rusty sad safe salty scarce scary secret selfish serious shaky shallow sharp
shiny short shy sick silent silly silver simple sleepy slim slippery slow small smart smooth snowy sober soft
solar solid sore sour spare spicy splendid stale steady steep sticky stiff still stormy strange strict strong
stubborn sturdy subtle sudden sunny super sweet swift tall tame tasty tense terrible thick thin thirsty thorough
tidy tight timid tiny tired tough tragic tranquil tricky true ugly uneven upper upset urban useful usual vague
vain valid vast velvet vivid warm wary weak weary weird wet whole wicked wide wild wise witty wooden woolly
worthy yellow young zesty
"""

_NOUNS = """
acorn actor airport alarm album anchor angle animal ankle answer apple apron arch arm army arrow artist ash
atlas attic aunt author avenue axe badge bag baker balcony ball bamboo banana band bank barn barrel basin basket
bath battery beach bead beak beam bean bear beard bed bee beetle bell belt bench berry bicycle bird biscuit
blade blanket blossom boat body bolt bone book boot border bottle bowl box bracelet branch brass bread breeze
brick bridge broom brother brush bubble bucket bull bus bush butter button cabin cable cactus cage cake calendar
camel camera camp canal candle cannon canoe canvas cap captain car card carpet carrot cart castle cat cattle
cave ceiling cellar cereal chain chair chalk channel chapel cheek cheese cherry chess chest chicken chief
chimney chin church circle circus city clay cliff clock cloth cloud clover coach coal coast coat coin collar
color comb comet compass cook coral cord corn corner cotton couch cousin cow crab cradle crane crate crayon
creek cricket crow crowd crown crystal cup curtain curve cushion dam dancer daughter dawn deck deer desert desk
diamond dinner dish ditch doctor dog doll dolphin donkey door dove dragon drain drawer dress drum duck dust
eagle ear earth echo edge egg elbow elephant engine evening eye face factory farm farmer father faucet feast
feather fence fern ferry field fig finger fire fish flag flame flask flock floor flour flower flute fly foam fog
foot forest fork fossil fountain fox frame friend frog fruit funnel fur game garage garden garlic gate giraffe
girl glacier glass globe glove glue goat goose gown grain grandfather grape grass gravel guard guest guide
guitar gull hair hall hammer hand harbor hare harp hat hawk hay head heart hedge heel helmet hen herb herd hill
hinge holiday home honey hook horn horse hospital hotel hour house ice igloo inch ink insect iron island ivory
jacket jam jar jaw jelly jewel judge jug juice jungle kettle key king kitchen kite kitten knee knife knot ladder
lady lake lamb lamp lantern lawn leaf leather lemon letter library lighthouse lily lime linen lion lip lizard
lobster lock log lunch machine magnet maid mail mango map maple marble market mask mast meadow meal medal melon
metal meteor mice milk mill mine mirror mitten mole monkey month moon morning moss moth mother motor mountain
mouse mouth mud museum mushroom music nail napkin neck needle nest net night north nose notebook nurse nut oak
oar oatmeal ocean office olive onion orchard organ otter oven owl ox oyster paddle page pail paint palace palm
pan paper parcel park parrot party paste path pea peach peak peanut pear pearl pebble pen pencil pepper piano
picture pig pigeon pillow pilot pin pine pipe pirate planet plant plate plow plum pocket poem poet pole pond
pony porch port postcard pot potato powder prince pudding puddle pump pumpkin puppet puppy quail quarry queen
quill quilt rabbit raccoon radio raft rail rain rainbow raisin ranch rat raven reef reindeer ribbon rice rifle
ring river road robin rock rocket roof room root rope rose rug ruler saddle sail sailor salad salmon salt sand
sandal scale scarf school scissors screw sea seal seed shade shark sheep shelf shell shelter ship shirt shoe
shop shore shoulder shovel shrimp silk sink sister skirt sky sled sleeve snail snake snow soap sock sofa soil
soldier son song soup spade spark sparrow spider sponge spoon spring squirrel stable stair stamp star statue
steam steel stem stone stool storm stove straw stream street string sugar suit summer sun swamp swan sweater
sword table tail tailor tent thimble thorn thread throat throne thumb thunder ticket tiger timber toad toast toe
tomato tongue tooth torch tower town toy tractor trail train tray treasure tree tribe truck trumpet trunk tub
tulip tunnel turkey turtle twig umbrella uncle valley van vase vault vegetable veil vest village vine violet
violin voice volcano wagon waist walnut wardrobe wasp watch water wave wax weather wheat wheel whip whistle
willow window wine wing winter wire wizard wolf wood wool worm wrist yacht yard yarn zebra zinc
"""

_VERBS = """
accept admire admit advise agree allow amuse announce appear applaud arrange arrive ask attach attack attempt
attend avoid bake balance beg begin behave belong bless blink boast boil borrow bounce bow breathe bring build
bury buy calculate carry carve catch cause challenge change charge chase cheat cheer chew choose chop claim clap
climb collect compare compete complain complete confess confuse consider construct contain continue copy correct
cough count cover crash crawl create cry cure dance dare decay decide decorate delay deliver depend describe
deserve destroy develop dig disagree discover dislike divide double doubt dream drink drive drop earn eat
educate embrace employ encourage end enjoy enter entertain escape examine excite excuse exercise exist expand
expect explain explode explore extend fail fasten fear feed feel fetch fight fill find finish flap float flow
fold follow forget forgive freeze gather gaze give glow grab greet grin grow guess handle hang happen harm hate
haunt heal hear heat help hide hit hold hope hug hum hunt hurry identify ignore imagine impress improve include
increase influence inform inject injure instruct intend invent invite join joke jump kick kiss kneel knit knock
know last laugh launch lead lean learn leave lend let lick lie lift like list listen live load look lose love
make manage march mark marry matter measure meddle meet melt memorize mend mix moan move multiply mumble need
nod note notice number obey object observe obtain offer owe own pack pass pause peel perform phone pinch
pinpoint place play please point polish pour practice pray preach prefer prepare present preserve pretend
prevent print produce promise protect provide pull punch punish push question queue race radiate reach read
realize receive recognize record reduce reflect refuse regret reign reject rejoice relax release rely remain
remember remind remove repair repeat replace reply report rescue retire return rhyme rinse risk rob rub ruin
rule run rush satisfy save saw say scatter scold scrape scratch scream scrub search see select send separate
serve settle sew shake share shave shiver shock shout show shrug sigh sing sit sketch ski skip slap sleep slide
slip smell smile smoke snatch sneeze sniff snore solve soothe sound speak spell spend spill spin spoil spot
spray sprout squash squeak squeal squeeze stain stand stare start stay steal steer stitch stop store strap
strengthen stretch strip stroke stuff subtract succeed suffer suggest supply support suppose surprise surround
suspect suspend swim swing switch take talk tap taste teach tear tease tell tempt terrify thank think throw
tickle tie tip touch tour tow trace trade transport trap travel treat tremble trick trip trot trouble trust try
tug tumble turn twist type understand undress unite unlock unpack untidy use vanish visit wail wait wake walk
wander want warn wash waste wave wear weep weigh welcome whirl whisper win wink wipe wish wobble wonder work
worry wrap wreck wrestle wriggle write yawn yell zip
"""

ADJECTIVES = tuple(_ADJECTIVES.split())
NOUNS = tuple(_NOUNS.split())
VERBS = tuple(_VERBS.split())
